"""Where a run's first weights come from, and runs that are made of other runs."""
