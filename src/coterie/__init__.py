"""coterie: diffusion models made of many experts.

Importing the package loads nothing: a name below, or a subpackage (``coterie.process``), is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Aux": "core.routing",
    "Batch": "core.batch",
    "CheckpointError": "core.errors",
    "Condition": "core.prediction",
    "Config": "core.config",
    "ConfigError": "core.errors",
    "Context": "core.context",
    "CoterieError": "core.errors",
    "DataError": "core.errors",
    "Losses": "core.batch",
    "Part": "core.registry",
    "Prediction": "core.prediction",
    "Registry": "core.registry",
    "Routing": "core.routing",
    "TrainingError": "core.errors",
}
"""Public name -> the module that defines it."""

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("coterie")
    if name in _HOME:
        return getattr(importlib.import_module(f"coterie.{_HOME[name]}"), name)
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"coterie.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"coterie.{name}":
                raise
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
