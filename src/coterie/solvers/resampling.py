"""Resampling of weighted particles: which are copied, which are dropped. All schemes are unbiased.

Particle k gets K W_k copies on average. ``systematic`` and ``residual`` never give it fewer than
floor(K W_k) copies, ``systematic`` never more than ceil(K W_k). Douc, Cappe and Moulines 2005
(arXiv:cs/0507025) compare the four. Weights are logarithms, sums are float64. Shapes: G systems of
K particles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

Scheme = Literal["multinomial", "stratified", "systematic", "residual"]
SCHEMES: tuple[Scheme, ...] = ("multinomial", "stratified", "systematic", "residual")


def normalise(log_weights: Tensor) -> Tensor:
    """f64 [G, K]: weights that add up to 1 in each row."""
    return torch.softmax(log_weights.double(), dim=1)


def effective_size(log_weights: Tensor) -> Tensor:
    """f64 [G]: effective number of particles, (sum W)^2 / sum W^2, from 1 to K."""
    log = log_weights.double()
    return torch.exp(2.0 * torch.logsumexp(log, 1) - torch.logsumexp(2.0 * log, 1))


def log_mean(log_weights: Tensor) -> Tensor:
    """f64 [G]: log of the mean weight, unnormalised."""
    log = log_weights.double()
    return torch.logsumexp(log, 1) - torch.log(log.new_tensor(log.shape[1]))


def resample(log_weights: Tensor, scheme: Scheme, rngs: Sequence[Generator]) -> Tensor:
    """i64 [G, K]: the ancestor of each particle, ascending in each row.

    Row g draws from ``rngs[g]`` alone, on the CPU, so systems do not depend on each other.
    """
    weights = normalise(log_weights)
    if scheme == "residual":
        return _residual(weights, rngs)
    points = _points(scheme, weights.shape[1], rngs).to(weights.device)
    return _invert(weights, points)


def _uniform(count: int, rngs: Sequence[Generator]) -> Tensor:
    return torch.stack([torch.rand(count, generator=rng, dtype=torch.float64) for rng in rngs])


def _points(scheme: Scheme, count: int, rngs: Sequence[Generator]) -> Tensor:
    """Sorted points in [0, 1), f64 [G, count]."""
    if scheme == "multinomial":
        return _uniform(count, rngs).sort(dim=1).values
    shift = _uniform(1 if scheme == "systematic" else count, rngs)
    return (torch.arange(count, dtype=torch.float64) + shift) / count


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Which particle's share of [0, 1) each point lies in."""
    edges = weights.cumsum(1)
    # Rounding must put no point beyond the last particle that has any weight.
    edges = edges.masked_fill(edges >= edges[:, -1:], 1.0)
    return torch.searchsorted(edges, points.contiguous(), right=True)


def _residual(weights: Tensor, rngs: Sequence[Generator]) -> Tensor:
    """floor(K W_k) copies of each, the rest drawn from what the floors leave."""
    rows = []
    for share, rng in zip(weights, rngs, strict=True):
        count = len(share)
        copies = torch.floor(count * share + 1e-9).long()
        rest = (count * share - copies).clamp_min(0.0)
        left = count - int(copies.sum())
        sure = torch.repeat_interleave(copies)
        if left:
            points = _points("multinomial", left, [rng]).to(share.device)
            drawn = _invert((rest / rest.sum())[None], points)[0]
            sure = torch.cat([sure, drawn]).sort().values
        rows.append(sure)
    return torch.stack(rows)
