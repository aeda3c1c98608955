"""Tiny models of the seven classes, made once; skipped where transformers is not installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """Kind -> a tiny random model, the same object each time: undo what you do to it."""
    pytest.importorskip("transformers")
    from tiny_hf_models import make_model

    return cache(make_model)
