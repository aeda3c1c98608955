"""A network that all experts of a layer share, after their outputs are summed (MoFME, AAAI
2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from coterie.core.config import Config
from coterie.core.numbers import inner_size
from coterie.nn.mlp import GeluMLP


class AdaptorConfig(Config):
    """A two-layer GELU network after the experts."""

    ratio: PositiveFloat  # inner size, as a multiple of the width
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GELU in its tanh approximation, or exact"""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)  # probability, after both linear maps


def build_adaptor(config: AdaptorConfig | float | None, width: int) -> GeluMLP | None:
    """The network; a number is short for ``AdaptorConfig(ratio=number)``, None gives no network."""
    if config is None:
        return None
    if isinstance(config, AdaptorConfig):
        inner = inner_size(config.ratio, width, "adaptor.ratio")
        return GeluMLP(width, inner, config.activation, config.dropout)
    return GeluMLP(width, inner_size(config, width, "adaptor"))
