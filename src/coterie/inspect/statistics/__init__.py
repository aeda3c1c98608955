"""Statistics computed from counts of routings."""
