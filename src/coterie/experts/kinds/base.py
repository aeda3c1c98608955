"""Base of expert kinds: shapes, initialisation, and a forward pass that every backend uses.

The forward pass of a kind does not see stacked weights. It asks a :class:`Weights` for the linear
map of a name. So the same code computes one expert on its rows (``loop``, ``sorted``, ``dense``)
and all experts on sorted rows (``grouped``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part, Registry

EXPERTS = Registry("experts", "coterie.experts")


class Geometry(NamedTuple):
    """Arguments of a convolution, in torch's order."""

    stride: int
    padding: int
    dilation: int
    groups: int


class FeedForward(NamedTuple):
    """Names of an expert's parameters in ``down(activation(up x + up_bias)) + down_bias``.

    For backends with kernels of their own. ``up`` is [F, D], or [2F, D] if ``gated`` (rows of the
    gate first: ``activation(gate) * up``); ``down`` is [D, F]. A bias is None if there is none.
    """

    up: str
    down: str
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool = False
    up_bias: str | None = None
    down_bias: str | None = None


class Weights(Protocol):
    """Access to the parameters that apply to the given rows."""

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """x [..., in] -> [..., out] by ``weight`` [out, in] and ``bias`` [out] of each row."""
        ...

    def conv(self, x: Tensor, weight: str, bias: str | None, geometry: Geometry) -> Tensor:
        """x [B, C, H, W] -> [B, C', H', W'] by ``weight`` [C', C / groups, k, k] and ``bias`` [C']
        of each row."""
        ...

    def vector(self, name: str, x: Tensor) -> Tensor:
        """The parameter ``name`` [D] of each row's expert, in the type of x [..., D]."""
        ...

    def constant(self, name: str) -> Tensor:
        """The buffer ``name`` of each row's expert, broadcastable against x [..., D]."""
        ...

    def normalise(self, x: Tensor, momentum: float, eps: float) -> Tensor:
        """x [..., D] normalised per unit over the rows of each expert (batch norm).

        Outside training it uses the running ``mean`` and ``variance``, which training updates.
        """
        ...


class ExpertKind(Part):
    """Base of all kinds of experts. ``width`` D is the size of an expert's input and output."""

    kind: str
    foldable: ClassVar[bool] = False
    """One affine map: a mixture of experts is again one expert (weights mix linearly)."""
    input_free: ClassVar[bool] = False
    """The output depends on the expert alone, not on x."""
    unit: ClassVar[Literal["token", "sample"] | None] = None
    """What a routed row must be; None: a token or a whole sample."""
    grid: ClassVar[bool] = False
    """A row is a grid of C = ``width`` channels: x is [B, C, H, W] in the place of [..., D]."""
    ends: ClassVar[tuple[str, ...]] = ()
    """Parameters behind which nothing follows: with these at zero an expert answers 0."""
    batch_statistics: ClassVar[bool] = False
    """In training an expert's answer to a row depends on its other rows."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of ONE expert; stacked tensors have a leading E."""
        raise NotImplementedError

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """x [..., D] -> [..., D]."""
        raise NotImplementedError

    def feed_forward(self) -> FeedForward | None:
        """The parameters' names, if :meth:`forward` is a plain feed-forward network; else None."""
        return None

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        """Initialise parameter ``name`` of one expert in place."""
        raise NotImplementedError

    def module(self, width: int) -> nn.Module:
        """A plain module that computes the same; :meth:`plain_names` maps parameter names."""
        raise NotImplementedError

    def plain_names(self) -> dict[str, str]:
        """Stacked name -> parameter name in :meth:`module`."""
        raise NotImplementedError

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of this shape."""
        return tuple(shape)

    def weights_of(self, module: nn.Module) -> dict[str, Tensor] | None:
        """A module's parameters by this kind's names; None if it is not one expert of this kind."""
        return None

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        """Parameters and buffers of one expert that computes ``sum_k gates[k] expert_k(x)``.

        ``experts``: parameters of one or more experts, of any inner sizes; ``gates`` f32 [k]. Exact
        but for rounding. ConfigError if this kind has no such expert.
        """
        hint = "its experts do not add up to one"
        raise ConfigError(describe("experts", self.kind, "a kind that can be fused", hint))

    def buffers(self, width: int) -> dict[str, Tensor]:
        """Constant per-expert tables [E, ...], computed from the configuration."""
        return {}

    def statistics(self, width: int) -> dict[str, Tensor]:
        """Initial running statistics of ONE expert; training updates them."""
        return {}

    def forward_all(self, x: Tensor, weights: Weights, experts: Sequence[int]) -> Tensor:
        """All of ``experts`` on every row: x [R, D] -> [E, R, D].

        ``weights`` get x with the experts as first dimension.
        """
        return self.forward(x.expand(len(experts), *x.shape), weights)

    def stream_width(self, width: int) -> int:
        """Number of channels of a row that one expert reads."""
        return width

    def fixed_count(self, width: int) -> int | None:
        """Number of experts if the kind fixes it; None: the layer decides."""
        return None

    def with_hidden(self, hidden: int) -> ExpertKind:
        """The same kind with another inner size; ConfigError if it has none."""
        hint = "shared experts and segments have an inner size of their own"
        raise ConfigError(describe("experts", self.kind, "a feed-forward network", hint))


def weighted_sum(
    experts: Sequence[Mapping[str, Tensor]], gates: Tensor, names: Iterable[str]
) -> dict[str, Tensor]:
    """``sum_k gates[k] expert_k[name]``, for parameters in which an expert is linear."""
    return {
        name: torch.stack([scaled(one[name], gate) for one, gate in zip(experts, gates)]).sum(0)
        for name in names
    }


def scaled(weight: Tensor, gate: Tensor) -> Tensor:
    """``gate * weight`` in float32 at least, rounded once to the type of ``weight``."""
    return (gate.to(torch.promote_types(weight.dtype, torch.float32)) * weight).to(weight.dtype)


def xavier_uniform(weight: Tensor, rng: Generator | None) -> None:
    """Xavier uniform initialisation of one expert's [out, in] matrix."""
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=rng)


def normal(weight: Tensor, std: float, rng: Generator | None) -> None:
    """Initialise with N(0, std)."""
    with torch.no_grad():
        weight.normal_(0.0, std, generator=rng)


def start_linears(module: nn.Module | None, std: float | None, rng: Generator | None) -> None:
    """Initialise a module's linear maps: weights N(0, std) or Xavier uniform, biases 0."""
    for linear in () if module is None else module.children():
        if isinstance(linear, nn.Linear) and linear.weight.device.type != "meta":
            if std is None:
                xavier_uniform(linear.weight, rng)
            else:
                normal(linear.weight, std, rng)
            nn.init.zeros_(linear.bias)
