"""coterie: diffusion models made of many experts."""
