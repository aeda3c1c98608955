"""Exact experts and router of a Gaussian mixture that is divided into clusters.

They test that an ensemble equals the denoiser of the whole data. Shapes: B batch, K clusters, C
components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.process import Mixture, Process


def split_mixture(mixture: Mixture, clusters: Sequence[int]) -> tuple[list[Mixture], Tensor]:
    """(data of each cluster, prior q [K]); ``clusters`` [C]: the cluster of each component."""
    index = torch.tensor(list(clusters))
    count = mixture.weights.shape[0]
    found = sorted(set(clusters))
    if len(index) != count or found != list(range(len(found))):
        allowed = f"{count} numbers 0, 1, ... without a gap"
        raise ConfigError(describe("clusters", tuple(clusters), allowed))
    parts, mass = [], []
    for cluster in found:
        rows = index == cluster
        total = mixture.weights[rows].sum()
        mass.append(total)
        parts.append(
            Mixture(mixture.means[rows], mixture.stds[rows], mixture.weights[rows] / total)
        )
    shares = torch.stack(mass)
    return parts, shares / shares.sum()


class ExactPosterior:
    """``posterior(x, t, cond) -> logits [B, K]``: log of prior times density of each cluster.

    ``prior`` replaces the clusters' own shares (a router trained on balanced clusters).
    """

    def __init__(
        self,
        process: Process,
        mixture: Mixture,
        clusters: Sequence[int],
        prior: Tensor | None = None,
    ) -> None:
        self.process = process
        self.parts, own = split_mixture(mixture, clusters)
        self.prior = own if prior is None else prior

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        densities = [part.log_prob(self.process, x, t) for part in self.parts]
        return torch.stack(densities, dim=1) + self.prior.to(x).log()
