"""What an expert is: shapes, initialisation and one forward written once for every dispatch.

A kind never sees stacked weights. It asks a :class:`Weights` for the affine map of a name, so the
same four lines serve one expert on its rows (``loop``, ``sorted``, ``dense``) and all experts on
sorted rows at once (``grouped``).
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor, nn

from coterie.core.registry import Part, Registry

EXPERTS = Registry("experts", "coterie.experts")


class Weights(Protocol):
    """The parameters that apply to the rows at hand."""

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """x [..., in] -> [..., out] by ``weight`` [out, in] and ``bias`` [out] of each row."""
        ...

    def vector(self, name: str, x: Tensor) -> Tensor:
        """The parameter ``name`` [D] of each row's expert, in the type of x [..., D]."""
        ...

    def constant(self, name: str) -> Tensor:
        """The buffer ``name`` of each row's expert, broadcastable against x [..., D]."""
        ...


class ExpertKind(Part):
    """Base of all expert kinds. ``width`` D is the size of an expert's input and output."""

    kind: str
    foldable: ClassVar[bool] = False
    """One affine map: a mixture of experts is again one expert (weights mix linearly)."""
    input_free: ClassVar[bool] = False
    """The output depends on the expert alone, not on x."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of ONE expert; stacked tensors have a leading E."""
        raise NotImplementedError

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """x [..., D] -> [..., D]."""
        raise NotImplementedError

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        """Initialise parameter ``name`` of one expert in place."""
        raise NotImplementedError

    def module(self, width: int) -> nn.Module:
        """A plain module with the same function, its parameters named by :meth:`plain_names`."""
        raise NotImplementedError

    def plain_names(self) -> dict[str, str]:
        """Stacked name -> parameter name in :meth:`module`."""
        raise NotImplementedError

    def buffers(self, width: int) -> dict[str, Tensor]:
        """Constant per-expert tables [E, ...], computed from the configuration."""
        return {}

    def fixed_count(self, width: int) -> int | None:
        """How many experts there are where the kind decides it; None = the layer decides."""
        return None

    def with_hidden(self, hidden: int) -> ExpertKind:
        """The same kind with another inner size; kinds without one refuse."""
        raise TypeError(f"experts of kind {self.kind!r} have no inner size")


def xavier_uniform(weight: Tensor, rng: Generator | None) -> None:
    """Glorot uniform of one expert's [out, in] slice (on the stack the fans would be wrong)."""
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=rng)


def normal(weight: Tensor, std: float, rng: Generator | None) -> None:
    with torch.no_grad():
        weight.normal_(0.0, std, generator=rng)
