"""What an expert is: shapes, initialisation and one forward written once for every dispatch.

A kind never sees stacked weights. It asks a :class:`Weights` for the affine map of a name, so the
same four lines serve one expert on its rows (``loop``, ``sorted``, ``dense``) and all experts on
sorted rows at once (``grouped``).
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
    """How a convolution walks over a grid, in the order of torch's arguments."""

    stride: int
    padding: int
    dilation: int
    groups: int


class FeedForward(NamedTuple):
    """``down(activation(up x + up_bias)) + down_bias`` by names of an expert's parameters, for
    backends with kernels of their own. ``up`` [F, D], or [2F, D] where ``gated`` (rows of the gate
    first: ``activation(gate) * up``), ``down`` [D, F]; None: no such bias."""

    up: str
    down: str
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool = False
    up_bias: str | None = None
    down_bias: str | None = None


class Weights(Protocol):
    """The parameters that apply to the rows at hand."""

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
        """x [..., D] with mean 0 and variance 1 of each unit over the rows of each expert; outside
        training by the statistics ``mean`` and ``variance``, which training moves."""
        ...


class ExpertKind(Part):
    """Base of all expert kinds. ``width`` D is the size of an expert's input and output."""

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
        """What :meth:`forward` is where it is a feed-forward network and nothing more."""
        return None

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        """Initialise parameter ``name`` of one expert in place."""
        raise NotImplementedError

    def module(self, width: int) -> nn.Module:
        """A plain module with the same function, its parameters named by :meth:`plain_names`."""
        raise NotImplementedError

    def plain_names(self) -> dict[str, str]:
        """Stacked name -> parameter name in :meth:`module`."""
        raise NotImplementedError

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the answer to x of this shape."""
        return tuple(shape)

    def weights_of(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The parameters of a module that is one expert of this kind, by our names; else None."""
        return None

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        """One expert that answers ``sum_k gates[k] expert_k(x)``: its parameters and buffers.

        ``experts``: those of at least one expert, by our names, of any inner sizes; ``gates`` f32
        [k]. Exact but for rounding. ConfigError where this kind has no such expert.
        """
        hint = "its experts do not add up to one"
        raise ConfigError(describe("experts", self.kind, "a kind that can be fused", hint))

    def buffers(self, width: int) -> dict[str, Tensor]:
        """Constant per-expert tables [E, ...], computed from the configuration."""
        return {}

    def statistics(self, width: int) -> dict[str, Tensor]:
        """What training moves besides the parameters of ONE expert, as it starts."""
        return {}

    def forward_all(self, x: Tensor, weights: Weights, experts: Sequence[int]) -> Tensor:
        """Every one of ``experts`` on every row: x [R, D] -> [E, R, D]. ``weights`` take x with
        the experts in front."""
        return self.forward(x.expand(len(experts), *x.shape), weights)

    def stream_width(self, width: int) -> int:
        """How much of a row one expert reads."""
        return width

    def fixed_count(self, width: int) -> int | None:
        """How many experts there are where the kind decides it; None = the layer decides."""
        return None

    def with_hidden(self, hidden: int) -> ExpertKind:
        """The same kind with another inner size; ConfigError for kinds without one."""
        hint = "shared experts and segments have an inner size of their own"
        raise ConfigError(describe("experts", self.kind, "a feed-forward network", hint))


def weighted_sum(
    experts: Sequence[Mapping[str, Tensor]], gates: Tensor, names: Iterable[str]
) -> dict[str, Tensor]:
    """``sum_k gates[k] expert_k[name]`` for parameters in which an expert's answer is linear."""
    return {
        name: torch.stack([scaled(one[name], gate) for one, gate in zip(experts, gates)]).sum(0)
        for name in names
    }


def scaled(weight: Tensor, gate: Tensor) -> Tensor:
    """``gate * weight`` in float32 at least, rounded once to the type of ``weight``."""
    return (gate.to(torch.promote_types(weight.dtype, torch.float32)) * weight).to(weight.dtype)


def xavier_uniform(weight: Tensor, rng: Generator | None) -> None:
    """Glorot uniform of one expert's [out, in] slice (on the stack the fans would be wrong)."""
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=rng)


def normal(weight: Tensor, std: float, rng: Generator | None) -> None:
    with torch.no_grad():
        weight.normal_(0.0, std, generator=rng)


def start_linears(module: nn.Module | None, std: float | None, rng: Generator | None) -> None:
    """Matrices of a module's own linear maps N(0, std), or by Xavier's rule; biases 0."""
    for linear in () if module is None else module.children():
        if isinstance(linear, nn.Linear) and linear.weight.device.type != "meta":
            if std is None:
                xavier_uniform(linear.weight, rng)
            else:
                normal(linear.weight, std, rng)
            nn.init.zeros_(linear.bias)
