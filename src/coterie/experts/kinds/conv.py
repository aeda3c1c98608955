"""Convolutions as experts (CondConv, arXiv:1904.04971; Dynamic Convolution, arXiv:1912.03458).

A convolution is linear in its kernel, so a mixture of E convolutions of one sample is one
convolution with the mixed kernel ``sum_e g_e W_e``: E kernels are added, not E feature maps. The
affine map on tokens is the 1 x 1 case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.experts.kinds.base import EXPERTS, ExpertKind, Geometry, Weights, weighted_sum


@EXPERTS.register
class Conv(ExpertKind):
    """A square 2-D convolution with zero padding, from ``width`` channels to ``out``.

    Unset fields are those of the convolution that the experts replace; elsewhere those of a 3 x 3
    convolution with bias that keeps channels and size.
    """

    kind: Literal["conv"] = "conv"
    kernel: PositiveInt | None = None  # side of the kernel in pixels
    out: PositiveInt | None = None  # output channels
    stride: PositiveInt | None = None  # step of the kernel in pixels
    padding: NonNegativeInt | None = None  # zeros added at each edge, in pixels
    dilation: PositiveInt | None = None  # distance of kernel entries in pixels
    groups: PositiveInt | None = None  # groups of channels that are convolved separately
    bias: bool | None = None  # add a bias per output channel
    foldable: ClassVar[bool] = True
    unit: ClassVar[Literal["token", "sample"] | None] = "sample"
    grid: ClassVar[bool] = True
    ends: ClassVar[tuple[str, ...]] = ("weight", "bias")

    @property
    def size(self) -> int:
        return self.kernel or 3

    @property
    def geometry(self) -> Geometry:
        dilation = self.dilation or 1
        padding = dilation * (self.size // 2) if self.padding is None else self.padding
        return Geometry(self.stride or 1, padding, dilation, self.groups or 1)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        out, groups = self.out or width, self.geometry.groups
        if width % groups or out % groups:
            allowed = f"a divisor of {width} and {out} channels"
            raise ConfigError(describe("experts.groups", groups, allowed))
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (out, width // groups, self.size, self.size)
        }
        return shapes if self.bias is False else {**shapes, "bias": (out,)}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        bias = None if self.bias is False else "bias"
        return weights.conv(x, "weight", bias, self.geometry)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        stride, padding, dilation, _ = self.geometry
        reach = dilation * (self.size - 1)
        sides = [(side + 2 * padding - reach - 1) // stride + 1 for side in shape[2:]]
        return (shape[0], self.out or shape[1], *sides)

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        return weighted_sum(experts, gates, experts[0])

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        """The rule of ``nn.Conv2d`` for kernels, expert by expert; biases start at zero."""
        if parameter.dim() == 1:
            torch.nn.init.zeros_(parameter)
            return
        bound = 1.0 / math.sqrt(math.prod(parameter.shape[1:]))
        with torch.no_grad():
            parameter.uniform_(-bound, bound, generator=rng)

    def module(self, width: int) -> nn.Module:
        stride, padding, dilation, groups = self.geometry
        out, bias = self.out or width, self.bias is not False
        return nn.Conv2d(width, out, self.size, stride, padding, dilation, groups, bias)

    def plain_names(self) -> dict[str, str]:
        return {"weight": "weight"} if self.bias is False else {"weight": "weight", "bias": "bias"}

    def weights_of(self, module: nn.Module) -> dict[str, Tensor] | None:
        """None for subclasses and hooked modules too, as they may compute something else."""
        if type(module) is not nn.Conv2d or module._forward_hooks or module._forward_pre_hooks:
            return None
        if module.padding_mode != "zeros" or self.model_dump(exclude={"kind"}) != _facts(module):
            return None
        return dict(module.named_parameters())

    def like(self, module: nn.Conv2d) -> Self:
        """A copy with the unset fields of ``module``; ConfigError if a set field differs
        from it."""
        if module.padding_mode != "zeros":
            raise ConfigError(describe("padding_mode", module.padding_mode, "zeros"))
        found = _facts(module)
        for field, value in found.items():
            if not isinstance(value, int):
                raise ConfigError(describe(field, value, "one number: squares only"))
            own = getattr(self, field)
            if own is not None and own != value:
                hint = "the convolution in this place has it"
                raise ConfigError(describe(f"experts.{field}", own, f"null or {value}", hint))
        return self.replace(**found)


def _facts(module: nn.Conv2d) -> dict[str, object]:
    """Our fields of a convolution; what is not square stays as it is."""
    pairs = {
        "kernel": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
    }
    return {
        **{name: pair[0] if len(set(pair)) == 1 else pair for name, pair in pairs.items()},
        "out": module.out_channels,
        "groups": module.groups,
        "bias": module.bias is not None,
    }
