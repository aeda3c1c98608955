"""Statistics of a particle run: effective sizes, ancestry, normaliser."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from coterie.solvers.resampling import effective_size, log_mean, normalise


@dataclass(frozen=True)
class ParticleStep:
    """One step of all systems, before resampling; one value per system."""

    t: float  # time of the step
    ess: list[float]  # effective number of particles
    max_weight: list[float]
    ancestors: list[int]  # number of the first K particles that have descendants
    clamped: list[float]  # share of increments that were cut off
    resampled: list[bool]


@dataclass
class ParticleRecord:
    """Statistics of G ``systems`` of K ``particles``."""

    particles: int
    systems: int
    steps: list[ParticleStep] = field(default_factory=list)
    log_weights: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # f64 [G, K], current
    log_ratio: Tensor = field(default_factory=lambda: torch.zeros(0))
    """f64 [G], log of current over initial normaliser, up to the last resampling"""
    ancestors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """i64 [G, K], first ancestor of each particle"""

    def add(
        self, t: float, log_weights: Tensor, ancestors: Tensor, clamped: Tensor, chosen: Tensor
    ) -> None:
        """Add a step: weights and ancestors before resampling, and the systems that were
        resampled."""
        step = ParticleStep(
            t=t,
            ess=effective_size(log_weights).tolist(),
            max_weight=normalise(log_weights).amax(1).tolist(),
            ancestors=distinct(ancestors).tolist(),
            clamped=clamped.tolist(),
            resampled=chosen.tolist(),
        )
        self.steps.append(step)

    def normaliser(self) -> Tensor:
        """f64 [G]: log of the current over the initial normaliser.

        For small steps the ratio itself (not its log) is an unbiased estimate, if nothing was
        clamped and ``interval`` covers all times.
        """
        return self.log_ratio + log_mean(self.log_weights)

    def summary(self) -> dict[str, float]:
        """``ess_mean``, ``ess_least``: effective share of the particles; ``ancestors``: mean share
        of the first particles that have descendants at the end; ``clamped``: share of increments
        cut off (above 0 the target is biased); ``resampled``: resamplings per system."""
        shares = [ess / self.particles for step in self.steps for ess in step.ess]
        return {
            "ess_mean": fmean(shares),
            "ess_least": min(shares),
            "ancestors": float(distinct(self.ancestors).double().mean()) / self.particles,
            "clamped": fmean(share for step in self.steps for share in step.clamped),
            "resampled": sum(sum(step.resampled) for step in self.steps) / self.systems,
        }

    def as_json(self) -> dict[str, Any]:
        """All values as plain numbers."""
        return {
            "particles": self.particles,
            "systems": self.systems,
            "summary": self.summary(),
            "log_ratio": self.normaliser().tolist(),
            "log_weights": self.log_weights.tolist(),
            "ancestors": self.ancestors.tolist(),
            "steps": [asdict(step) for step in self.steps],
        }


def distinct(ancestors: Tensor) -> Tensor:
    """i64 [G]: different numbers in each row [G, K]; resampling keeps rows sorted."""
    return 1 + (ancestors.diff(dim=1) != 0).sum(1)
