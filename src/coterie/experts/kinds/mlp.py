"""Feed-forward experts: two-layer GELU with biases, and bias-free SwiGLU.

SwiGLU weights use the layout of Hugging Face MoE models: ``gate_up`` [E, 2F, D] with the gate rows
first, ``down`` [E, D, F]; so a converter is a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.numbers import inner_size
from coterie.experts.kinds.base import (
    EXPERTS,
    ExpertKind,
    FeedForward,
    Weights,
    normal,
    scaled,
    weighted_sum,
    xavier_uniform,
)
from coterie.nn import mlp


class _HiddenKind(ExpertKind):
    """Shared by kinds with an inner size F: ``hidden``, or ``ratio`` times the width."""

    hidden: PositiveInt | None = None  # inner size F; null: ratio times the width
    ratio: PositiveFloat = 4.0  # inner size as a multiple of the width
    init_std: NonNegativeFloat | None = None  # of the weights; null: Xavier uniform per expert

    def size(self, width: int) -> int:
        """Inner size F."""
        return inner_size(self.ratio, width) if self.hidden is None else self.hidden

    def with_hidden(self, hidden: int) -> Self:
        return self.replace(hidden=hidden)

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        if parameter.dim() == 1:
            torch.nn.init.zeros_(parameter)
        elif self.init_std is not None:
            normal(parameter, self.init_std, rng)
        else:
            xavier_uniform(parameter, rng)


@EXPERTS.register
class SwiGLU(_HiddenKind):
    """``down(SiLU(gate(x)) * up(x))``, without biases; three matrices D x F."""

    kind: Literal["swiglu"] = "swiglu"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the gate; gelu gives GEGLU
    ends: ClassVar[tuple[str, ...]] = ("down",)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        inner = self.size(width)
        return {"gate_up": (2 * inner, width), "down": (width, inner)}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        gate, up = weights.linear(x, "gate_up").chunk(2, dim=-1)
        return weights.linear(mlp.GLU_ACTIVATIONS[self.activation](gate) * up, "down")

    def feed_forward(self) -> FeedForward:
        return FeedForward("gate_up", "down", self.activation, gated=True)

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        """All gate rows, then all up rows; columns of ``down`` times their expert's gate."""
        halves = zip(*(one["gate_up"].chunk(2) for one in experts))
        down = [scaled(one["down"], gate) for one, gate in zip(experts, gates)]
        rows = [part for half in halves for part in half]
        return {"gate_up": torch.cat(rows), "down": torch.cat(down, dim=1)}

    def module(self, width: int) -> nn.Module:
        return mlp.SwiGLU(width, self.size(width), self.activation)

    def plain_names(self) -> dict[str, str]:
        return {"gate_up": "gate_up.weight", "down": "down.weight"}


@EXPERTS.register
class GeluMLP(_HiddenKind):
    """``down(GELU(up(x) + b1)) + b2``: the feed-forward block of a DiT."""

    kind: Literal["gelu_mlp"] = "gelu_mlp"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GELU in its tanh approximation, or exact"""
    ends: ClassVar[tuple[str, ...]] = ("down", "down_bias")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        inner = self.size(width)
        return {
            "up": (inner, width),
            "up_bias": (inner,),
            "down": (width, inner),
            "down_bias": (width,),
        }

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        inner = mlp.GLU_ACTIVATIONS[self.activation](weights.linear(x, "up", "up_bias"))
        return weights.linear(inner, "down", "down_bias")

    def feed_forward(self) -> FeedForward:
        return FeedForward("up", "down", self.activation, up_bias="up_bias", down_bias="down_bias")

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        """Rows of ``up`` one expert after another; columns of ``down`` times its gate."""
        down = [scaled(one["down"], gate) for one, gate in zip(experts, gates)]
        return {
            "up": torch.cat([one["up"] for one in experts]),
            "up_bias": torch.cat([one["up_bias"] for one in experts]),
            "down": torch.cat(down, dim=1),
            **weighted_sum(experts, gates, ["down_bias"]),
        }

    def module(self, width: int) -> nn.Module:
        return mlp.GeluMLP(width, self.size(width), self.activation)

    def plain_names(self) -> dict[str, str]:
        return {
            "up": "up.weight",
            "up_bias": "up.bias",
            "down": "down.weight",
            "down_bias": "down.bias",
        }
