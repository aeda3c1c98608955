"""coterie: diffusion models made of many experts.

Importing the package loads nothing: a name below, or a subpackage (``coterie.process``), is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for editors and type checkers
    from coterie.convert import UpcycleConfig as UpcycleConfig
    from coterie.convert import upcycle as upcycle
    from coterie.core.batch import Batch as Batch
    from coterie.core.batch import Losses as Losses
    from coterie.core.config import Config as Config
    from coterie.core.context import Context as Context
    from coterie.core.errors import CheckpointError as CheckpointError
    from coterie.core.errors import ConfigError as ConfigError
    from coterie.core.errors import CoterieError as CoterieError
    from coterie.core.errors import DataError as DataError
    from coterie.core.errors import TrainingError as TrainingError
    from coterie.core.prediction import Condition as Condition
    from coterie.core.prediction import Prediction as Prediction
    from coterie.core.registry import Part as Part
    from coterie.core.registry import Registry as Registry
    from coterie.core.routing import Aux as Aux
    from coterie.core.routing import Routing as Routing
    from coterie.data import build_source as build_source
    from coterie.denoiser import Denoiser as Denoiser
    from coterie.denoiser import DenoiserConfig as DenoiserConfig
    from coterie.experts import ExpertLayer as ExpertLayer
    from coterie.experts import ExpertLayerConfig as ExpertLayerConfig
    from coterie.experts import RouterConfig as RouterConfig
    from coterie.hub import load_pretrained as load_pretrained
    from coterie.hub import save_pretrained as save_pretrained
    from coterie.inspect import Trace as Trace
    from coterie.process import Process as Process
    from coterie.recipes import get_recipe as get_recipe
    from coterie.recipes import list_recipes as list_recipes
    from coterie.runs.config import RunConfig as RunConfig
    from coterie.runs.sample.sample_files import sample_run as sample_run
    from coterie.runs.trained_run import load_run as load_run
    from coterie.runs.training import start as start
    from coterie.solvers import GuidanceConfig as GuidanceConfig
    from coterie.solvers import guide as guide
    from coterie.solvers import sample as sample
    from coterie.train import TrainConfig as TrainConfig
    from coterie.train import Trainer as Trainer

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
    "Denoiser": "denoiser",
    "DenoiserConfig": "denoiser",
    "ExpertLayer": "experts",
    "ExpertLayerConfig": "experts",
    "GuidanceConfig": "solvers",
    "Losses": "core.batch",
    "Part": "core.registry",
    "Prediction": "core.prediction",
    "Process": "process",
    "Registry": "core.registry",
    "RouterConfig": "experts",
    "Routing": "core.routing",
    "RunConfig": "runs.config",
    "Trace": "inspect",
    "TrainConfig": "train",
    "Trainer": "train",
    "TrainingError": "core.errors",
    "UpcycleConfig": "convert",
    "build_source": "data",
    "get_recipe": "recipes",
    "guide": "solvers",
    "list_recipes": "recipes",
    "load_pretrained": "hub",
    "load_run": "runs.trained_run",
    "sample": "solvers",
    "sample_run": "runs.sample.sample_files",
    "save_pretrained": "hub",
    "start": "runs.training",
    "upcycle": "convert",
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
