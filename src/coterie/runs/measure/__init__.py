"""Measurements of a trained run: quality, routing, and the role of each expert."""
