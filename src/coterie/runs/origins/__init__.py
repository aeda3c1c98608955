"""Initial weights of runs, and runs that are made of other runs."""
