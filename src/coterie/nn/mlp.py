"""Dense feed-forward networks; the experts are stacked versions of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


GLU_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}
"""What the gate half of a gated linear unit may pass through (arXiv:2002.05202)."""


class GeluMLP(nn.Module):
    """down(GELU(up(x))), with biases. [..., D] -> [..., D].

    ``activation``: GELU exactly, or in its tanh approximation. ``dropout`` after both maps.
    """

    def __init__(
        self, width: int, hidden: int, activation: str = "gelu_tanh", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = GLU_ACTIVATIONS[self.activation](self.up(x))
        if not self.dropout:
            return self.down(inner)
        inner = F.dropout(inner, self.dropout, self.training)
        return F.dropout(self.down(inner), self.dropout, self.training)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), bias-free; gate rows come first in ``gate_up``.

    ``activation``: another name of :data:`GLU_ACTIVATIONS` in the place of SiLU.
    """

    def __init__(self, width: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(GLU_ACTIVATIONS[self.activation](gate) * up)


class Star(nn.Module):
    """GELU(A x) * (C x): two linear maps, multiplied. [..., D] -> [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.gate(x)) * self.value(x)


class Modulation(nn.Module):
    """gamma(x) * x + beta(x): affine ``maps`` of x, or vectors. [..., D] -> [..., D]."""

    def __init__(self, width: int, maps: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width, width)) if maps else None
        self.beta = nn.Parameter(torch.zeros(width, width)) if maps else None
        self.gamma_bias = nn.Parameter(torch.ones(width))
        self.beta_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is None or self.beta is None:
            return self.gamma_bias * x + self.beta_bias
        return F.linear(x, self.gamma, self.gamma_bias) * x + F.linear(x, self.beta, self.beta_bias)
