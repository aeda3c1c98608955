"""Bridges to other libraries: expert layers in their models, and routings of their models."""
