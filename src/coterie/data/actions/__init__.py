"""Demonstrations of robots."""
