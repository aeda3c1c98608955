"""Building what a run's configuration describes: its model, data and initial weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from coterie.backbones.base import BackbonePart
from coterie.convert import UpcycleConfig, upcycle, upcycled_config
from coterie.core import memory
from coterie.core.batch import Source
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import derive, generator
from coterie.core.tensors import assign, module_tensors
from coterie.core.threads import check_threads
from coterie.experts.routers.config import within
from coterie.runs.config import RunConfig
from coterie.runs.origins.adapters import put_new
from coterie.runs.origins.first_weights import InitConfig, calibration, load_source, put_on_base


def build_model(config: RunConfig) -> Any:
    """The model with initial weights that depend on ``config.seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        model = config.model.build()
        if config.init is not None:
            put_new(model, config.init.adapters)
        return model


def based_model(config: RunConfig) -> Any:
    """The model with its base, if it has adapters, but without the run's own weights."""
    model = build_model(config)
    if config.init is not None and config.init.adapters:
        put_on_base(model, config.init)
    return model


def check_fits(config: RunConfig, training: bool = True, parts: int = 1) -> None:
    """ConfigError if the model needs more memory than this machine has, computed from shapes.

    ``parts``: number of processes that share the model.
    """
    if getattr(config.model, "is_trained", False) or getattr(config.model, "absent", ""):
        return  # what others trained says how large it is when it is read
    most = memory.memory_bytes() * parts
    if training and config.train.threads is not None:
        check_threads(config.train.threads)
    made = memory.on_meta(config.model, lambda: build_model(config), most)
    train = config.train if training else None
    batch = config.train.batch // config.train.accumulate if training else config.sample.batch
    memory.check_memory(config.model, made, train, batch, parts)


def build_source(config: RunConfig, split: str = "train") -> Source:
    """The data source, checked against the model's sample shape and classes."""
    source: Source = config.data.build(split=split)
    backbone = getattr(config.model, "backbone", None)
    wanted = getattr(backbone, "sample_shape", None)
    if wanted is not None and tuple(source.shape) != tuple(wanted):
        hint = f"source {source.name!r} yields samples of shape {tuple(source.shape)}"
        raise ConfigError(describe("model.backbone", tuple(wanted), str(source.shape), hint))
    words, known = getattr(source, "vocab_size", 0), getattr(backbone, "vocabulary", None)
    if known is not None and words > known:
        hint = f"source {source.name!r} has {words} tokens"
        raise ConfigError(describe("model.backbone.vocabulary", known, f"{words} or more", hint))
    classes = getattr(backbone, "num_classes", None)
    if classes and source.num_classes != classes:
        hint = config.data.explain_classes(source)
        allowed = str(source.num_classes)
        raise ConfigError(describe("model.backbone.num_classes", classes, allowed, hint))
    check = getattr(backbone, "check_source", None)
    if check is not None:
        within("model.backbone", partial(check, source))
    if isinstance(backbone, BackbonePart):
        known = {"label": source.num_classes, "task": len(getattr(source, "task_names", ()))}
        told = backbone.told - {name for name, count in known.items() if not count}
        within("model.backbone", partial(backbone.check_told, told, f"source {source.name!r}"))
    return source


def initial_model(config: RunConfig, source: Source) -> Any:
    """The model with its initial weights: random, or those of ``config.init``.

    CheckpointError names the first tensor of ``init.path`` that does not fit ``config.model``.
    """
    model = based_model(config)
    init = config.init
    if init is None or init.adapters:
        return model
    found = load_source(init)
    if init.upcycle is not None:
        run = calibration(config.objective, source, config.seed, init.upcycle.calibration)
        rng = generator(config.seed, "upcycle", init.upcycle.seed)
        _, found = upcycle(found, init.upcycle, run, rng)
    assign(module_tensors(model), module_tensors(found), f"init.path: {init.path}")
    return model


def upcycled_run(config: RunConfig, path: str | Path, upcycling: UpcycleConfig) -> RunConfig:
    """``config`` with expert layers in its model, initialised from the dense weights at
    ``path``."""
    return config.replace(
        model=upcycled_config(config.model, upcycling),
        init=InitConfig(path=str(path), upcycle=upcycling),
    )
