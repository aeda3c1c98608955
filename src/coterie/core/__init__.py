"""Records that all other packages exchange (Batch, Context, Prediction, Routing), and basic tools.

Imports torch, numpy and pydantic only.
"""
