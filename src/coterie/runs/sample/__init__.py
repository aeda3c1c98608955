"""Sampling from runs: images, texts, roll-outs, restored pictures; guidance networks and caches."""
