"""Distributions of the noise levels in training: t f32 [B].

Discrete processes get exact grid times. "Unit time" is t itself, or the position in log sigma for
``ve``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Generator, Tensor

from coterie.core.registry import Part, Registry
from coterie.process.base import Process

TIMES = Registry("times", "coterie.times")


class Times(Protocol):
    """Draws the times of a training batch."""

    def sample(self, batch: int, rng: Generator) -> Tensor:
        """f32 [batch], between the process's ``t_min`` and ``t_max``."""
        ...


def _snap(process: Process, t: Tensor) -> Tensor:
    """Clamp f64 times to the usable range; a discrete process's to its grid; as f32."""
    t = t.clamp(process.t_min, process.t_max)
    if process.discrete:
        return process.time_of_index(process.step_index(t))
    return t.float()


def _from_unit(process: Process, unit: Tensor) -> Tensor:
    """Unit time in [0, 1) -> t. Discrete: index floor(unit T), so each has an equal share."""
    if process.discrete:
        index = (unit.double() * process.num_steps).long().clamp(0, process.num_steps - 1)
        return process.time_of_index(index)
    return _snap(process, process.time_of_unit(unit.double()))


def _uniform(batch: int, rng: Generator) -> Tensor:
    return torch.rand(batch, generator=rng, dtype=torch.float64, device=rng.device)


def _normal(batch: int, rng: Generator) -> Tensor:
    return torch.randn(batch, generator=rng, dtype=torch.float64, device=rng.device)


@dataclass(frozen=True)
class _Uniform:
    process: Process

    def sample(self, batch: int, rng: Generator) -> Tensor:
        return _from_unit(self.process, _uniform(batch, rng))


@TIMES.register
class UniformTimes(Part):
    """Uniform in unit time."""

    kind: Literal["uniform"] = "uniform"

    def build(self, process: Process) -> Times:
        return _Uniform(process)


@dataclass(frozen=True)
class _LogitNormal:
    process: Process
    mean: float
    std: float

    def sample(self, batch: int, rng: Generator) -> Tensor:
        unit = torch.sigmoid(self.mean + self.std * _normal(batch, rng))
        return _from_unit(self.process, unit)


@TIMES.register
class LogitNormalTimes(Part):
    """logit(unit time) ~ N(mean, std^2) (arXiv:2403.03206, section 3.1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0  # of logit(unit time)
    std: float = Field(1.0, gt=0)  # of logit(unit time)

    def build(self, process: Process) -> Times:
        return _LogitNormal(process, self.mean, self.std)


@dataclass(frozen=True)
class _LogNormalSigma:
    process: Process
    mean: float
    std: float

    def sample(self, batch: int, rng: Generator) -> Tensor:
        log_sigma = self.mean + self.std * _normal(batch, rng)
        return _snap(self.process, self.process.time_of_lam(-log_sigma))


@TIMES.register
class LogNormalSigmaTimes(Part):
    """ln(sigma / alpha) ~ N(mean, std^2), for any process (arXiv:2206.00364, table 1)."""

    kind: Literal["log_normal_sigma"] = "log_normal_sigma"
    mean: float = -1.2  # of ln(sigma / alpha)
    std: float = Field(1.2, gt=0)  # of ln(sigma / alpha)

    def build(self, process: Process) -> Times:
        return _LogNormalSigma(process, self.mean, self.std)


@dataclass(frozen=True)
class _LogLogisticSigma:
    process: Process
    median: float
    scale: float

    def sample(self, batch: int, rng: Generator) -> Tensor:
        ends = torch.tensor([self.process.t_min, self.process.t_max], dtype=torch.float64)
        location = math.log(self.median)
        low, high = torch.sigmoid((-self.process.lam(ends) - location) / self.scale).tolist()
        share = low + (high - low) * _uniform(batch, rng)
        log_sigma = location + self.scale * torch.logit(share, eps=1e-12)
        return _snap(self.process, self.process.time_of_lam(-log_sigma))


@TIMES.register
class LogLogisticSigmaTimes(Part):
    """ln(sigma / alpha) is logistic, truncated at the ends of the process.

    As in MoDE (arXiv:2412.12953) and BESO (arXiv:2304.02532).
    """

    kind: Literal["log_logistic_sigma"] = "log_logistic_sigma"
    median: float = Field(0.5, gt=0)  # of sigma / alpha
    scale: float = Field(0.5, gt=0)  # of the logistic distribution of ln(sigma / alpha)

    def build(self, process: Process) -> Times:
        return _LogLogisticSigma(process, self.median, self.scale)


@dataclass(frozen=True)
class _Stratified:
    process: Process
    clusters: int

    def sample(self, batch: int, rng: Generator) -> Tensor:
        order = torch.randperm(self.clusters, generator=rng, device=rng.device)
        cluster = order[torch.arange(batch, device=rng.device) % self.clusters]
        unit = _uniform(batch, rng)
        if not self.process.discrete:
            return _from_unit(self.process, (cluster + unit) / self.clusters)
        # Clusters of indices, as in cluster_of: sizes differ by at most one.
        edges = torch.arange(self.clusters + 1, device=rng.device) * self.process.num_steps
        edges = -(-edges // self.clusters)
        low, high = edges[cluster], edges[cluster + 1]
        return self.process.time_of_index((low + unit * (high - low)).long().clamp(low, high - 1))


@TIMES.register
class StratifiedTimes(Part):
    """The same number of samples from each of several equal ranges of unit time.

    If the batch is not a multiple of ``clusters``, numbers differ by one at random.
    """

    kind: Literal["stratified"] = "stratified"
    clusters: int = Field(8, ge=1)  # number of equal ranges of unit time

    def build(self, process: Process) -> Times:
        return _Stratified(process, self.clusters)


def cluster_of(process: Process, t: Tensor, clusters: int) -> Tensor:
    """i64 [B]: which of ``clusters`` equal ranges of the process each time lies in."""
    if process.discrete:
        return process.step_index(t) * clusters // process.num_steps
    unit = process.unit_time(t.double())
    return (unit * clusters).long().clamp(0, clusters - 1)
