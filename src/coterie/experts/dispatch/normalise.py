"""Batch normalisation of experts, each over its own rows.

In training the mean and the variance of an expert's rows; outside it the running statistics, which
training moves. Legend: R rows, D units, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 2
"""Rows from which an expert has statistics of its own; with fewer it uses the running ones."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """``running``: ``mean`` and ``variance`` [..., D], moved by ``momentum`` while training."""

    running: Mapping[str, Tensor]
    training: bool
    momentum: float
    eps: float

    def apply(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return ((x.float() - mean) * torch.rsqrt(variance + self.eps)).to(x.dtype)

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        """Towards statistics [..., D] of ``count`` rows ([..., 1] where experts differ); the
        running variance is unbiased, as torch's is."""
        rows = torch.as_tensor(count, device=mean.device, dtype=torch.float32)
        weight = torch.where(rows < FEWEST, 0.0, self.momentum)
        unbiased = variance.detach() * rows / (rows - 1).clamp_min(1)
        for name, value in (("mean", mean.detach()), ("variance", unbiased)):
            own = self.running[name]
            own.copy_(torch.lerp(own.float(), value, weight.expand_as(value)))


def normalise(x: Tensor, statistics: Statistics) -> Tensor:
    """x [..., R, D] with statistics over the rows R."""
    if not statistics.training or x.shape[-2] < FEWEST:
        mean, variance = (statistics.running[name].float() for name in ("mean", "variance"))
        return statistics.apply(x, mean.unsqueeze(-2), variance.unsqueeze(-2))
    variance, mean = torch.var_mean(x.float(), dim=-2, correction=0, keepdim=True)
    statistics.move(mean.squeeze(-2), variance.squeeze(-2), x.shape[-2])
    return statistics.apply(x, mean, variance)


def normalise_segments(x: Tensor, ids: Tensor, statistics: Statistics) -> Tensor:
    """x [R, D] of rows of several experts, ``ids`` i64 [R]; statistics are [E, D]."""
    mean, variance = (statistics.running[name].float() for name in ("mean", "variance"))
    if statistics.training:
        count = torch.bincount(ids, minlength=len(mean)).float()[:, None]
        enough, rows = count >= FEWEST, count.clamp_min(1)
        own = torch.zeros_like(mean).index_add(0, ids, x.float()) / rows
        centred = x.float() - own[ids]
        spread = torch.zeros_like(mean).index_add(0, ids, centred.square()) / rows
        statistics.move(own, spread, count)
        mean, variance = torch.where(enough, own, mean), torch.where(enough, spread, variance)
    return statistics.apply(x, mean[ids], variance[ids])
