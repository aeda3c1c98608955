"""Simulators and renderers: sources that are computed, not fetched."""
