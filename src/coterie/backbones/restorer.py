"""A restoration transformer: convolutions around a few transformer blocks (MoFME, AAAI 2024).

Maps a degraded picture to a clean one in one pass; noise level and condition are ignored.
Convolutional head, patches, blocks without position or modulation, patches back to pixels,
convolutional tail. There is no skip connection from input to output. Shapes: B batch, C channels, H
x W pixels, P patch, N = HW / P^2 tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.backbones.base import BACKBONES, BackboneOutput, BackbonePart
from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.experts.routers.config import within

Padding = Literal["reflect", "zeros"]

RESTORER_TRUNK = TrunkConfig(modulation="none", width=384, depth=2, heads=8, norm="layer")


@BACKBONES.register
class RestorerConfig(BackbonePart):
    """A network that restores a degraded picture in one pass."""

    kind: Literal["restorer"] = "restorer"
    told: ClassVar[frozenset[str]] = frozenset({"step_index", "label", "task"})
    image_size: int = Field(64, ge=1)  # side of the square picture in pixels
    channels: int = Field(3, ge=1)  # of the picture
    patch: int = Field(8, ge=1)  # side of a patch in pixels
    stem: int = Field(32, ge=1)  # channels before the patches (paper: 32)
    tail: int = Field(128, ge=2)  # channels after the patches, halved once (paper: 128)
    padding: Padding = "reflect"  # of the convolutions (paper: zeros)
    trunk: TrunkConfig = RESTORER_TRUNK  # the transformer blocks and their expert slots

    @model_validator(mode="after")
    def _check(self) -> RestorerConfig:
        if self.image_size % self.patch:
            allowed = f"a divisor of image_size = {self.image_size}"
            raise ConfigError(describe("patch", self.patch, allowed))
        if self.trunk.modulation != "none":
            hint = "nothing modulates a picture's restoration"
            raise ConfigError(describe("trunk.modulation", self.trunk.modulation, "none", hint))
        within("trunk", lambda: self.trunk.check_grid(self.grid))
        self.check_told(self.told)
        return self

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch
        return side, side

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.channels, self.image_size, self.image_size

    def build(self) -> Restorer:
        return Restorer(self)

    def multiply_adds(self) -> int:
        """Multiply-adds of one picture's forward pass, without those of attention scores."""
        with torch.device("meta"):
            model = self.build()
        pixels = sum(count_parameters(part).total for part in (model.head, model.tail))
        tokens = count_parameters(model).active - pixels
        return pixels * self.image_size**2 + tokens * self.tokens


def convolution(inputs: int, outputs: int, padding: Padding) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=padding)


class ResidualConvolution(nn.Module):
    """``x + conv(ReLU(conv(x)))``, 3 x 3."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.first = convolution(channels, channels, padding)
        self.second = convolution(channels, channels, padding)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def spread(x: Tensor, side: int) -> Tensor:
    """[B, C s^2, H, W] -> [B, C, s H, s W]: ``F.pixel_shuffle``, whose gradient of an empty batch
    has the wrong shape."""
    tiles = x.unflatten(1, (-1, side, side)).permute(0, 1, 4, 2, 5, 3)
    return tiles.flatten(4, 5).flatten(2, 3)


class Restorer(nn.Module):
    """``forward(x [B, C, H, W] in [-1, 1], ctx, cond) -> BackboneOutput`` in the same range."""

    def __init__(self, config: RestorerConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, half = config.trunk.width, config.patch, config.tail // 2
        padding = config.padding
        self.head = nn.Sequential(
            convolution(config.channels, config.stem, padding),
            ResidualConvolution(config.stem, padding),
            ResidualConvolution(config.stem, padding),
        )
        self.patch_in = nn.Conv2d(config.stem, width, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(width)
        self.trunk = Trunk(config.trunk, config.tokens, config.grid)
        self.patch_out = nn.Linear(width, patch * patch * config.tail)
        self.tail = nn.Sequential(
            ResidualConvolution(config.tail, padding),
            convolution(config.tail, half, padding),
            ResidualConvolution(half, padding),
            convolution(half, config.channels, padding),
        )
        self.trunk.reset_parameters()

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape}]"))
        ctx = ctx.replace(
            batch=x.shape[0],
            tokens=self.config.tokens,
            label=cond.label,
            task=cond.task,
            positions=torch.arange(self.config.tokens, device=x.device),
        )
        z_BND = self.patch_norm(self.patch_in(self.head(x)).flatten(2).transpose(1, 2))
        z_BND, routings = self.trunk(z_BND, ctx)
        patches = self.patch_out(z_BND).transpose(1, 2).unflatten(2, self.config.grid)
        pixels = spread(patches, self.config.patch)
        return BackboneOutput(torch.tanh(self.tail(pixels)), routings)
