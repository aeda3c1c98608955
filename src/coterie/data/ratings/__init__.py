"""Ratings: who judged what, with an answer per task."""
