"""Texts: one token per byte, packaged or made up, with their topics."""
