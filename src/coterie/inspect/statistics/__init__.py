"""What is computed: counts of routings and everything that follows from them."""
