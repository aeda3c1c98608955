"""Loss weights that are trained with the denoiser, at a learning rate of their own (``lr``).

``uncertainty``: one log-variance per cluster of times (ANT-UW: Go et al. 2023, arXiv:2306.00354,
after Kendall et al. 2018, arXiv:1705.07115). ``time_uncertainty``: a smooth u(t), loss exp(-u) L +
u (Karras et al. 2024, arXiv:2312.02696, eq. 14).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from coterie.core.registry import Part
from coterie.core.share import summed
from coterie.process.base import Process
from coterie.process.times import cluster_of
from coterie.process.views import check_view
from coterie.process.weightings import WEIGHTINGS, ConstantWeighting


class ClusterUncertainty(nn.Module):
    """sum_i 0.5 (exp(-s_i) l_i + s_i), l_i = mean loss of cluster i / clusters.

    A cluster without a sample in the batch adds nothing, so its s_i does not change. Use it with
    ``stratified`` times of as many clusters.
    """

    def __init__(self, process: Process, clusters: int, lr: float) -> None:
        super().__init__()
        self.process, self.clusters, self.lr = process, clusters, lr
        self.log_variance = nn.Parameter(torch.zeros(clusters))

    def forward(self, t: Tensor, view: str) -> Tensor:
        """f32 [B]: the current factor of each sample's loss."""
        check_view(view)
        return 0.5 * torch.exp(-self.log_variance[cluster_of(self.process, t, self.clusters)])

    def combine(self, per_sample: Tensor, t: Tensor, view: str) -> Tensor:
        check_view(view)
        cluster = cluster_of(self.process, t, self.clusters)
        losses = per_sample.float()
        sums = losses.new_zeros(self.clusters).index_add(0, cluster, losses)
        counts = losses.new_zeros(self.clusters).index_add(0, cluster, torch.ones_like(losses))
        sums, counts = summed(sums, counts)
        means = sums / counts.clamp_min(1.0) / self.clusters
        terms = 0.5 * (torch.exp(-self.log_variance) * means + self.log_variance)
        return (terms * (counts > 0)).sum()


@WEIGHTINGS.register
class UncertaintyWeighting(Part):
    """A learned uncertainty for each of several equal ranges of time."""

    kind: Literal["uncertainty"] = "uncertainty"
    clusters: int = Field(8, ge=1)  # number of ranges
    lr: float = Field(0.025, gt=0)  # learning rate of the uncertainties

    def build(self, process: Process) -> ClusterUncertainty:
        return ClusterUncertainty(process, self.clusters, self.lr)


class TimeUncertainty(nn.Module):
    """mean of exp(-u) w L + u; u(t) is linear in Fourier features of unit time and starts at 0."""

    def __init__(self, process: Process, base: Part, harmonics: int, lr: float) -> None:
        super().__init__()
        self.process, self.lr = process, lr
        self.base = base.build(process)
        self.harmonics = harmonics
        self.weight = nn.Parameter(torch.zeros(2 * harmonics))
        self.bias = nn.Parameter(torch.zeros(()))

    def u(self, t: Tensor) -> Tensor:
        """f32 [B]: learned log of the expected weighted loss."""
        unit = self.process.unit_time(t.double())
        orders = torch.arange(1, self.harmonics + 1, device=t.device, dtype=torch.float64)
        # Half periods: the two ends of the process are not identified with each other.
        angles = math.pi * unit[:, None] * orders
        # 1/k damps high frequencies, so u moves first where it is smooth.
        features = torch.cat([torch.cos(angles) / orders, torch.sin(angles) / orders], dim=1)
        return features.float() @ self.weight + self.bias

    def forward(self, t: Tensor, view: str) -> Tensor:
        return torch.exp(-self.u(t)) * self.base(t, view)

    def combine(self, per_sample: Tensor, t: Tensor, view: str) -> Tensor:
        return (self(t, view) * per_sample.float() + self.u(t)).mean()


@WEIGHTINGS.register
class TimeUncertaintyWeighting(Part):
    """A learned uncertainty that is a smooth function of time, on top of a fixed weighting."""

    kind: Literal["time_uncertainty"] = "time_uncertainty"
    base: Annotated[SerializeAsAny[Part], WEIGHTINGS.validator] = ConstantWeighting()
    """the fixed weighting"""
    harmonics: int = Field(8, ge=1)  # number of Fourier features of time
    lr: float = Field(1e-2, gt=0)  # learning rate of the uncertainty

    def build(self, process: Process) -> TimeUncertainty:
        return TimeUncertainty(process, self.base, self.harmonics, self.lr)
