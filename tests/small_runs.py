"""Finished runs of a few steps on digits and on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.core.config import override
from coterie.runs.config import RunConfig
from coterie.runs.training import start
from small_models import small

SHORT: dict[str, Any] = {
    "train.steps": 4,
    "train.batch": 8,
    "train.warmup": 0,
    "train.log_every": 2,
    "train.checkpoint_every": 2,
    "train.threads": 1,
    "sample.steps": 2,
}


def short(name: str, **changes: Any) -> RunConfig:
    """``name`` as in ``small``; keyword ``a__b`` stands for the path ``a.b``."""
    paths = {key.replace("__", "."): value for key, value in changes.items()}
    return override(small(name), {**SHORT, **paths})


def finished(name: str, out: Path, **changes: Any) -> Path:
    return start(short(name, **changes), out, progress=False)
