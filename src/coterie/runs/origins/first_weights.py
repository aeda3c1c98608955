"""Initial weights of a run that come from another run or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from coterie.adapters import AdapterConfig, base_tensors, fold
from coterie.convert import UpcycleConfig
from coterie.core.batch import Source
from coterie.core.config import Config
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import MANIFEST, file_digest
from coterie.core.json_reader import read_object
from coterie.core.machine import commit
from coterie.core.numbers import Total
from coterie.core.paths import Place, beside
from coterie.core.registry import Part
from coterie.core.rng import generator
from coterie.core.tensors import assign, module_tensors
from coterie.data import order
from coterie.denoiser import MODELS
from coterie.hub import load_manifest, load_pretrained
from coterie.hub.layout import model_config
from coterie.runs.origins.adapters import put_new, put_trained
from coterie.train import checkpoint
from coterie.train.run_directory import stored_hash
from coterie.train.state import load_weights

MICRO_BATCH = 64  # samples at a time that calibrate a router
KINDS = "a run directory or a model directory"


class Origin(Config):
    """Identity of the initial weights; found when the run begins and kept in its
    ``config.json``."""

    digest: str  # SHA-256 of the manifest, which lists the hash of every file
    step: Total | None = None  # training step of the checkpoint; null for a model directory
    commit: str = ""  # of the code that read them


class InitConfig(Config):
    """Start from the weights of another run or model. Optimiser and averages start anew."""

    path: Place = Field(min_length=1)
    """A run directory (its newest checkpoint) or a model directory."""
    weights: str = "ema"
    """of a run directory: ema (first decay), ema-<decay>, or model (not averaged)"""
    upcycle: UpcycleConfig | None = None
    """Turn the dense weights into experts first. The model then has the slots of
    :func:`coterie.convert.upcycled_config`."""
    adapters: tuple[AdapterConfig, ...] = ()
    """Adapters to add; the weights themselves are not trained. Only new adapters are trained and
    saved; without any, ``train.steps`` is 0. Such a run reads its base each time it is loaded."""
    origin: Origin | None = None  # identity of the weights; filled in when the run begins

    @model_validator(mode="after")
    def _one_way(self) -> InitConfig:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) < len(names):
            raise ConfigError(describe("adapters", names, "names that all differ"))
        if names and self.upcycle is not None:
            hint = "upcycle first, and put adapters on that run"
            raise ConfigError(describe("upcycle", self.upcycle.mode, "null with adapters", hint))
        return self

    @property
    def trains_nothing(self) -> bool:
        """Whether all that is added comes from elsewhere."""
        return bool(self.adapters) and all(adapter.path for adapter in self.adapters)


def source_config(path: str | Path) -> Part:
    """Configuration of the model at ``path``; ConfigError if it is neither a run nor a model."""
    path = Path(path)
    if (path / "config.json").is_file():
        found = model_config(_config_of(path))
    elif (path / MANIFEST).is_file():
        found = model_config(load_manifest(path).config)
    else:
        raise ConfigError(describe("init.path", str(path), KINDS))
    if found is None:
        raise ConfigError(describe("init.path", str(path), KINDS, "it describes no such model"))
    with beside(path):
        return MODELS.parse(found)


def find_origin(init: InitConfig) -> Origin:
    """Which weights ``init`` would read now."""
    source_config(init.path)
    path = Path(init.path)
    if not (path / "config.json").is_file():
        return Origin(digest=file_digest(path / MANIFEST), commit=commit())
    if is_untrained(path):
        return Origin(digest=file_digest(path / "config.json"), step=0, commit=commit())
    newest = checkpoint.latest(path, stored_hash(path))
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint yet; train the run first")
    step = next(step for step, folder in checkpoint.steps(path) if folder == newest)
    return Origin(digest=file_digest(newest / MANIFEST), step=step, commit=commit())


def load_source(init: InitConfig) -> Any:
    """The model at ``init.path`` with its weights, in eval mode.

    CheckpointError if they are not those of ``init.origin``.
    """
    if init.origin is not None and find_origin(init).digest != init.origin.digest:
        raise CheckpointError(
            f"{init.path}: holds other weights than when this run was configured "
            f"(step {init.origin.step}); start a new run"
        )
    if not (Path(init.path) / "config.json").is_file():
        return load_pretrained(init.path)
    model: nn.Module = source_config(init.path).build()
    theirs = init_of(init.path)
    adapted = None if theirs is None or not theirs.adapters else theirs
    if adapted is not None:
        put_new(model, adapted.adapters)
        put_on_base(model, adapted)
    if not is_untrained(init.path):
        load_weights(init.path, model, init.weights)
    if adapted is not None:  # a guide's experts are no such adapters: they stay apart
        fold(model)
    return model.eval()


def put_on_base(model: nn.Module, init: InitConfig) -> None:
    """Give a model, with its new adapters, the base that ``init`` names and the other adapters."""
    assign(base_tensors(model), module_tensors(load_source(init)), f"init.path: {init.path}")
    base = find_origin(init).digest
    for adapter in init.adapters:
        if adapter.path is not None:
            put_trained(model, adapter, base)


def init_of(path: str | Path) -> InitConfig | None:
    """Where the first weights of the run at ``path`` come from."""
    found = _config_of(path).get("init")
    with beside(path):
        return None if found is None else InitConfig.from_dict(found)


def is_untrained(path: str | Path) -> bool:
    """Whether the run at ``path`` trains nothing: its model is what the configuration names."""
    return bool(_config_of(path).get("train", {}).get("steps") == 0)


def _config_of(path: str | Path) -> dict[str, Any]:
    return read_object(Path(path) / "config.json", error=ConfigError)


def calibration(
    objective: Part, source: Source, seed: int, samples: int
) -> Callable[[nn.Module], None]:
    """``run(model)``: the objective's forward passes on ``samples`` of the data, for a converter
    that wants to see what goes through a model."""

    def run(model: nn.Module) -> None:
        ask = objective.build(model)
        rows = order(seed, 0, min(samples, len(source)), len(source))
        for first in range(0, len(rows), MICRO_BATCH):
            batch = source.get(rows[first : first + MICRO_BATCH])
            ask(model, batch, generator(seed, "calibration", first), 0.0)

    return run
