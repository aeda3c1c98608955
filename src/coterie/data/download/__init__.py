"""Fetching packaged data once, into the user's cache."""
