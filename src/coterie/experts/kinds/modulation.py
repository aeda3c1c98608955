"""Experts that scale and shift features which a shared network has computed (MoFME, AAAI 2024).

``FME_i(u) = gamma_i(u) * u + beta_i(u)``: as cheap as two linear maps, or as two vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from coterie.experts.kinds.base import EXPERTS, ExpertKind, Weights, weighted_sum, xavier_uniform
from coterie.nn import mlp


@EXPERTS.register
class Modulation(ExpertKind):
    """A scale and a shift of the features, the identity at the start."""

    kind: Literal["modulation"] = "modulation"
    form: Literal["linear", "vector"] = "linear"
    """gamma and beta are linear maps of u (2 D^2 parameters), or vectors (2 D, FiLM)"""
    ends: ClassVar[tuple[str, ...]] = ("gamma", "beta", "gamma_bias", "beta_bias")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        vectors: dict[str, tuple[int, ...]] = {"gamma_bias": (width,), "beta_bias": (width,)}
        if self.form == "vector":
            return vectors
        return {"gamma": (width, width), "beta": (width, width), **vectors}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        if self.form == "vector":
            return weights.vector("gamma_bias", x) * x + weights.vector("beta_bias", x)
        gamma = weights.linear(x, "gamma", "gamma_bias")
        return gamma * x + weights.linear(x, "beta", "beta_bias")

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        """Exact, as the output is linear in gamma and beta."""
        return weighted_sum(experts, gates, experts[0])

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        if parameter.dim() == 2:
            xavier_uniform(parameter, rng)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name == "gamma_bias" else 0.0)

    def module(self, width: int) -> nn.Module:
        return mlp.Modulation(width, maps=self.form == "linear")

    def plain_names(self) -> dict[str, str]:
        return {name: name for name in self.shapes(1)}
