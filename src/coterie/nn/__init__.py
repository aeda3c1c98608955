"""Floor 1: layers that know nothing about diffusion or routing."""
