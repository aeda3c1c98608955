"""Ratings of items by users, with a label per task."""
