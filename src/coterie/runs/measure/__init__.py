"""What a trained run is worth, and what each of its experts does."""
