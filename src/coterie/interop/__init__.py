"""Bridges to other libraries: their models, seen and changed through the same records."""
