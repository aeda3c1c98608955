"""A small network that reads clean pictures: their class, a map of them, a class per pixel.

Shapes: B batch, C channels, K outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part
from coterie.denoiser import MODELS
from coterie.encoders import MapNetwork, SmallClassifier
from coterie.guides.tasks import Task


@MODELS.register
class ReaderConfig(Part):
    """``classes``: of the data; a ``pixels`` reader has one more, for pixels without ink, and a
    ``map`` reader none."""

    kind: Literal["reader"] = "reader"
    task: Task = "classes"
    image_size: int = Field(28, ge=8)
    channels: int = Field(1, ge=1)
    classes: int = Field(10, ge=1)
    width: int = Field(32, ge=1)
    feature_dim: int = Field(128, ge=1)  # classes only
    norm: Literal["group", "batch"] = "batch"

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.image_size, self.image_size)

    @property
    def backbone(self) -> ReaderConfig:
        """It is all network: what runs check against their data."""
        return self

    def multiply_adds(self) -> int:
        """Of one picture, counted on shapes alone."""
        with torch.device("meta"):
            return multiply_adds(self.build(), self.sample_shape)

    def build(self) -> Reader:
        return Reader(self)


class Reader(nn.Module):
    """``forward(x [B, C, H, W]) -> Prediction`` of logits [B, K], or of [B, K, H, W]."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config, self.task = config, config.task
        self.sample_shape = config.sample_shape
        rng = Generator().manual_seed(int(torch.randint(2**31, (), device="cpu")))
        self.network: nn.Module
        if config.task == "classes":
            sizes = (config.channels, config.classes, config.width, config.feature_dim)
            self.network = SmallClassifier(*sizes, rng=rng, norm=config.norm)
        else:
            outputs = 1 if config.task == "map" else config.classes + 1
            self.network = MapNetwork(config.channels, outputs, config.width, rng, config.norm)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        """It knows nothing of noise: only x is read."""
        check_shape(x, self.sample_shape)
        return Prediction(self.network(x), "logits")


def check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    """DataError unless x is [B, *shape]."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise DataError(describe("x.shape", tuple(x.shape), f"[B, {', '.join(map(str, shape))}]"))


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the convolutions and linear maps of ``model`` for one sample; on the meta device too."""
    total = 0

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += weight[0].numel() * output.numel()

    maps = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in maps]
    was = model.training
    model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    model.train(was)
    for hook in hooks:
        hook.remove()
    return total
