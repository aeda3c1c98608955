"""Experts that scale the input of a block: m = 1 + layer(z), in the slot ``pre_block``.

``affine`` (Switch-DiT, arXiv:2403.09176): one map D -> D per expert that starts at zero, so m = 1.
``channel_window`` (DTR, arXiv:2310.07138): no parameters; expert e returns 0 on the channels it
keeps and -1 on the others, so m is the binary mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from coterie.core.numbers import Seed
from coterie.core.rng import generator
from coterie.experts.kinds.base import EXPERTS, ExpertKind, Weights, weighted_sum
from coterie.experts.windows import window_masks, window_size


@EXPERTS.register
class Affine(ExpertKind):
    """``A_e x + b_e`` with A_e [D, D], both zero at the start."""

    kind: Literal["affine"] = "affine"
    foldable: ClassVar[bool] = True
    ends: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (width, width), "bias": (width,)}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return weights.linear(x, "weight", "bias")

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        torch.nn.init.zeros_(parameter)

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        return weighted_sum(experts, gates, experts[0])

    def module(self, width: int) -> nn.Module:
        return nn.Linear(width, width)

    def plain_names(self) -> dict[str, str]:
        return {"weight": "weight", "bias": "bias"}


@EXPERTS.register
class ChannelWindow(ExpertKind):
    """Fixed channel masks: expert e keeps ``n = int(C * share)`` of C channels."""

    kind: Literal["channel_window"] = "channel_window"
    share: float = Field(default=0.8, gt=0.0, le=1.0)  # share of the channels that an expert keeps
    mode: Literal["window", "random"] = "window"
    """window: channels e .. e+n-1, so C - n + 1 experts; random: random subsets"""
    num_masks: int = Field(1000, ge=1, le=10**6)  # number of experts in mode random
    seed: Seed = 0  # of the random subsets
    input_free: ClassVar[bool] = True

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {}

    def fixed_count(self, width: int) -> int:
        if self.mode == "random":
            return self.num_masks
        return width - window_size(width, self.share) + 1

    def buffers(self, width: int) -> dict[str, Tensor]:
        size = window_size(width, self.share)
        if self.mode == "window":
            kept = window_masks(torch.arange(self.fixed_count(width)), width, size)
        else:
            rng = generator(self.seed, "channel_window")
            order = torch.rand(self.num_masks, width, generator=rng).argsort(dim=1, stable=True)
            kept = torch.zeros(self.num_masks, width, dtype=torch.bool)
            kept.scatter_(1, order[:, :size], 1)
        return {"delta": kept.float() - 1.0}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return weights.constant("delta").to(x.dtype).expand(x.shape)

    def fuse(self, experts: Sequence[Mapping[str, Tensor]], gates: Tensor) -> dict[str, Tensor]:
        return weighted_sum(experts, gates, ["delta"])

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        raise TypeError("channel windows have no parameters")

    def module(self, width: int) -> nn.Module:
        raise TypeError("channel windows have no parameters to unpack")

    def plain_names(self) -> dict[str, str]:
        return {}
