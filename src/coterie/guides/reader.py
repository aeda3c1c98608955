"""A small network for clean pictures: predicts a class, a map, or a class per pixel.

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
    """A small convolutional network that recognises clean pictures."""

    kind: Literal["reader"] = "reader"
    task: Task = "classes"  # what it predicts: the class, a map, or a class per pixel
    image_size: int = Field(28, ge=8)  # side of the square picture in pixels
    channels: int = Field(1, ge=1)  # of the picture
    classes: int = Field(10, ge=1)  # of the data; ``pixels`` adds one for background
    width: int = Field(32, ge=1)  # channels of the first layer
    feature_dim: int = Field(128, ge=1)  # classes only
    norm: Literal["group", "batch"] = "batch"  # group norm or batch norm

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
        """The prediction from x; the noise level is ignored."""
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
