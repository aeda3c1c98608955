"""Weights of N experts' features at one point of networks that run in lockstep.

    F = concat(f_1 .. f_N);  h = Conv1x1(N C -> d)(F);  h = ResidualBlock(h, e)
    h = SpatialTransformer(h, c);  A = softmax over N of Conv1x1(d -> N)(h);  f = sum_i A_i f_i

per pixel and point (SABW of Adaptive Feature Aggregation, Wang et al. 2025, arXiv:2405.17082): e is
the mean of the experts' embeddings of the noise level, c of their tokens of the condition. The last
convolution has no bias and starts at zero, so A starts as 1 / N: the mean of the features.

Shapes: B batch, N experts, C channels, H x W pixels, T, S widths of time and condition.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from coterie.backbones.taps import Point, Topology
from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.nn.spatial import ResidualBlock, SpatialTransformer

Gate = Literal["spatial", "step", "uniform"]


class AggregatorConfig(Config):
    """Size of a spatial aggregator."""

    width: PositiveInt = 128  # d, channels inside
    layers: int = Field(2, ge=0, le=4096)  # transformer layers
    heads: PositiveInt = 8  # attention heads
    groups: PositiveInt = 32  # groups of the group norms

    @model_validator(mode="after")
    def _check(self) -> AggregatorConfig:
        for name in ("heads", "groups"):
            if self.width % getattr(self, name):
                allowed = f"a divisor of width = {self.width}"
                raise ConfigError(describe(name, getattr(self, name), allowed))
        return self

    def parameters(self, channels: int, experts: int, time_width: int, seen_width: int) -> int:
        """Number of parameters of an aggregator for ``experts`` features of ``channels``."""
        d = self.width
        residual = 2 * (9 * d * d + d) + (time_width + 1) * d + 4 * d
        seen = d * d + 2 * seen_width * d + d * d + d + 2 * d if seen_width else 0
        block = 4 * d * d + d + seen + (8 * d * d + 8 * d) + (4 * d * d + d) + 4 * d
        transformer = 2 * d + 2 * (d * d + d) + self.layers * block
        return (experts * channels + 1) * d + residual + transformer + d * experts


class SpatialAggregator(nn.Module):
    """``forward(features [B, N, C, H, W], e [B, T], c [B, M, S]) -> logits f32 [B, N, H, W]``."""

    def __init__(
        self, config: AggregatorConfig, point: Point, experts: int, topology: Topology
    ) -> None:
        super().__init__()
        width = config.width
        self.conv_in = nn.Conv2d(experts * point.channels, width, 1)
        self.residual = ResidualBlock(width, topology.time_width, config.groups)
        self.transformer = SpatialTransformer(
            width, config.heads, config.layers, topology.condition_width, config.groups
        )
        self.conv_out = nn.Conv2d(width, experts, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self,
        features: Tensor,
        time: Tensor,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        h = self.residual(self.conv_in(features.flatten(1, 2)), time)
        logits: Tensor = self.conv_out(self.transformer(h, seen, mask))
        return logits.float()


class StepAggregator(nn.Module):
    """One weight per expert and noise level, equal at all pixels: logits f32 [B, N, 1, 1]."""

    def __init__(self, experts: int, topology: Topology) -> None:
        super().__init__()
        self.head = nn.Linear(topology.time_width, experts, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        features: Tensor,
        time: Tensor,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        logits: Tensor = self.head(nn.functional.silu(time))
        return logits.float()[:, :, None, None]


class UniformAggregator(nn.Module):
    """The mean of the features; no parameters. Logits f32 [B, N, 1, 1], all 0."""

    def forward(
        self,
        features: Tensor,
        time: Tensor,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return torch.zeros(features.shape[:2], device=features.device)[:, :, None, None]


def make_aggregator(
    gate: Gate, config: AggregatorConfig, point: Point, experts: int, topology: Topology
) -> nn.Module:
    if gate == "spatial":
        return SpatialAggregator(config, point, experts, topology)
    return StepAggregator(experts, topology) if gate == "step" else UniformAggregator()
