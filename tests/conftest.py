"""Settings of the whole suite: few threads, no display, repeatable property tests."""

from __future__ import annotations

import os

# Before anything imports torch: tensors here are small, and more threads make them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

settings.register_profile("coterie", deadline=None, derandomize=True, database=None)
settings.load_profile("coterie")
