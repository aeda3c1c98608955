"""A trained model, read from its folder, for ensembles (:mod:`coterie.ensembles.model`) and
teachers.

A run whose ``model`` is one of these, with ``train.steps`` 0, trains nothing. Its configuration
says how the model is sampled and evaluated, and every command accepts it like any other run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from coterie.core.errors import ConfigError, describe
from coterie.core.folder import MANIFEST
from coterie.core.paths import Place
from coterie.core.registry import Part
from coterie.core.tensors import assign, module_tensors
from coterie.denoiser import MODELS
from coterie.ensembles.base import check_share
from coterie.runs.origins.first_weights import (
    InitConfig,
    Origin,
    find_origin,
    is_untrained,
    load_source,
    source_config,
)
from coterie.train import checkpoint


@MODELS.register
class PretrainedConfig(Part):
    """A trained model with its weights, in eval mode and frozen."""

    kind: Literal["pretrained"] = "pretrained"
    path: Place = Field("runs/dit", min_length=1)  # a run directory or a model directory
    weights: str = "ema"  # of a run: ema (first decay), ema-<decay>, or model (not averaged)
    origin: Origin | None = None  # identity that the weights must have; null: any
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating type of its computation; predictions have the type of x."""
    is_trained: ClassVar[bool] = True

    @property
    def _init(self) -> InitConfig:
        return InitConfig(path=self.path, weights=self.weights, origin=self.origin)

    @property
    def absent(self) -> str:
        """Why there is nothing at ``path`` to load; "" if there is."""
        path = Path(self.path)
        if (path / "config.json").is_file():
            here = is_untrained(path) or checkpoint.steps(path)
            return "" if here else f"{path} has no checkpoint yet"
        return "" if (path / MANIFEST).is_file() else f"nothing at {path}"

    @property
    def model(self) -> Part:
        """The configuration of the model that lies there."""
        return source_config(self.path)

    @property
    def backbone(self) -> Any:
        return self.model.backbone

    def pinned(self) -> PretrainedConfig:
        """With the origin of the weights that lie there now."""
        return self.replace(origin=find_origin(self._init))

    def build(self) -> Any:
        """CheckpointError if the weights are damaged, or not those of ``origin``."""
        return load_source(self._init).requires_grad_(False).to(getattr(torch, self.precision))


@MODELS.register
class WeightAverageConfig(Part):
    """The mean of the weights of several models of one configuration, frozen ("model soup")."""

    kind: Literal["weight_average"] = "weight_average"
    paths: tuple[Place, ...] = Field(("runs/dit",), min_length=1)  # run or model directories
    shares: tuple[float, ...] | None = None  # weight of each in the mean; null: equal
    weights: str = "ema"  # of a run: ema (first decay), ema-<decay>, or model (not averaged)
    is_trained: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> WeightAverageConfig:
        if self.shares is not None:
            check_share("shares", self.shares, len(self.paths))
        return self

    @property
    def absent(self) -> str:
        """Why one of them cannot be loaded; "" if all can."""
        return next((why for one in self._models if (why := one.absent)), "")

    @property
    def model(self) -> Part:
        """The configuration of the model that lies at the first path."""
        return self._models[0].model

    @property
    def backbone(self) -> Any:
        return self.model.backbone

    @property
    def _models(self) -> tuple[PretrainedConfig, ...]:
        return tuple(PretrainedConfig(path=path, weights=self.weights) for path in self.paths)

    @torch.no_grad()
    def build(self) -> Any:
        """CheckpointError where a model is not there, or has other tensors than the first."""
        first = self._models[0].model
        for path, one in zip(self.paths, self._models, strict=True):
            if one.model != first:
                hint = f"weights of one model are averaged; {self.paths[0]} has another"
                raise ConfigError(describe("paths", path, "models of one configuration", hint))
        shares = self.shares or (1.0 / len(self.paths),) * len(self.paths)
        out = self._models[0].build()
        mean = {
            name: torch.zeros_like(value) if value.is_floating_point() else value.clone()
            for name, value in module_tensors(out).items()
        }
        for share, one in zip(shares, self._models, strict=True):
            for name, value in module_tensors(one.build()).items():
                if value.is_floating_point():
                    mean[name].add_(value, alpha=share)
        assign(module_tensors(out), mean, "weight_average")
        return out
