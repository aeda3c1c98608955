"""Floor 0: the contracts as records. Imports torch, numpy and pydantic only."""
