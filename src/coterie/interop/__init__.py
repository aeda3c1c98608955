"""Floor 5: bridges to other libraries: their models, seen and changed through the same records."""
