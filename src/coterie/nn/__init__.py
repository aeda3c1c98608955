"""Layers without knowledge of diffusion or routing."""
