"""Whether samples cover the clusters of the data, which sparse choices may prevent.

Near pure noise the posterior is the prior of the clusters for every x: top-1 sends every sample to
the largest cluster first, and some never reach another one.
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
    """Shares of samples per cluster, compared with those of the data."""

    histogram: tuple[float, ...]  # share of the samples in each cluster
    prior: tuple[float, ...]  # share of the data in each cluster
    total_variation: float  # half the summed difference; 0: equal, 1: disjoint
    expected: float  # its mean for as many samples drawn from the prior
    num_samples: int


def coverage(clusters: Tensor, prior: Sequence[float]) -> Coverage:
    """``clusters``: i64 [S], the cluster of each sample; ``prior``: of the data, [K]."""
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
