"""A normalised feed-forward network, as one expert alone: the plain form of a stacked kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu", "relu", "gelu"]
Norm = Literal["batch", "layer", "none"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
}


class FeatureGate(nn.Module):
    """``x * 2 sigmoid(A (B x))`` with A [D, r], B [r, D]: the identity while A is 0 (HoME)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(width, rank, bias=False)
        self.expand = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 * torch.sigmoid(self.expand(self.reduce(x)))


class NormMLP(nn.Module):
    """``act(norm(down(act(up(gate(x))))))``; ``hidden`` None: one map; ``rank`` None: no gate.

    A map in front of batch statistics has no bias: they would take it away again.
    """

    def __init__(
        self,
        width: int,
        out: int,
        hidden: int | None,
        norm: Norm,
        activation: Activation,
        rank: int | None,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = None if rank is None else FeatureGate(width, rank)
        self.up = None if hidden is None else nn.Linear(width, hidden)
        self.down = nn.Linear(hidden or width, out, bias=norm != "batch")
        self.norm: nn.Module | None = None
        if norm == "batch":
            self.norm = nn.BatchNorm1d(out, eps=eps, momentum=momentum)
        elif norm == "layer":
            self.norm = nn.LayerNorm(out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.gate is None else self.gate(x)
        x = x if self.up is None else self.activation(self.up(x))
        x = self.down(x)
        if self.norm is not None:
            x = self.norm(x.flatten(0, -2)).view(x.shape)
        return self.activation(x)
