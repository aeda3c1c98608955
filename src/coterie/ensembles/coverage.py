"""Do samples cover the clusters of the data? What sparse choices cost near pure noise.

There the posterior is the clusters' prior whatever x is: top-1 sends every sample to the largest
cluster first, and those that should have become another have to find their way later, or do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.ensembles.base import check_share


@dataclass(frozen=True)
class Coverage:
    """``histogram``: share of the samples in each cluster; ``prior``: of the data;
    ``total_variation``: half the sum of their differences, 0 = alike, 1 = disjoint; ``expected``:
    its mean for as many samples drawn from the prior, which is what chance alone leaves."""

    histogram: tuple[float, ...]
    prior: tuple[float, ...]
    total_variation: float
    expected: float
    num_samples: int


def coverage(clusters: Tensor, prior: Sequence[float]) -> Coverage:
    """``clusters``: i64 [S], the cluster each sample was found in; ``prior``: of the data, [K]."""
    count = len(prior)
    check_share("prior", prior, count)
    if clusters.dim() != 1 or not len(clusters):
        raise ConfigError(describe("clusters", tuple(clusters.shape), "[S], S >= 1"))
    if not 0 <= int(clusters.min()) <= int(clusters.max()) < count:
        raise DataError(describe("clusters", sorted(set(clusters.tolist())), f"0..{count - 1}"))
    total = len(clusters)
    share = torch.bincount(clusters.cpu(), minlength=count).double() / total
    goal = torch.tensor(prior, dtype=torch.float64)
    # E|Binomial(S, q) / S - q| by its normal approximation.
    chance = (2.0 / torch.pi * goal * (1.0 - goal) / total).sqrt()
    return Coverage(
        tuple(share.tolist()),
        tuple(goal.tolist()),
        float(0.5 * (share - goal).abs().sum()),
        float(0.5 * chance.sum()),
        total,
    )
