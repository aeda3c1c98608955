"""Denoisers for ranges of the noise level, the noisiest first.

Wan 2.2's pair (``transformer``, ``transformer_2``, ``boundary_ratio``) is an example; there may be
any number, of any process. If members are on disk (:mod:`.residency`), the one in use is in memory
and the next one is read meanwhile. Shapes: B batch, K members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.routing import Routing
from coterie.ensembles.base import ENSEMBLES, Ensemble, EnsembleConfig, as_members
from coterie.ensembles.members import Members
from coterie.process import ContrastConfig, contrast, with_and_without
from coterie.process.contrast import MOST
from coterie.process.ranges import RangesConfig


@ENSEMBLES.register
class NoiseRangesConfig(RangesConfig, EnsembleConfig):
    """Denoisers for ranges of the noise level; ``boundaries`` count in the ensemble's process."""

    kind: Literal["noise_ranges"] = "noise_ranges"
    guidance: tuple[float | None, ...] | None = None
    """Guidance weight of each member (classifier-free); null: that of the sampling run."""

    @model_validator(mode="after")
    def _check(self) -> NoiseRangesConfig:
        if self.guidance is not None and len(self.guidance) != self.count:
            allowed = f"{self.count} weights, one per range"
            raise ConfigError(describe("guidance", self.guidance, allowed))
        for weight in self.guidance or ():
            if weight is not None and not abs(weight) <= MOST:
                allowed = f"weights from {-MOST:g} to {MOST:g}"
                raise ConfigError(describe("guidance", weight, allowed))
        return self

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
    ) -> NoiseRanges:
        """The ensemble. ``members``: the noisiest first. ``router`` is not used."""
        if router is not None:
            raise ConfigError(describe("router", type(router).__name__, "none", "t decides"))
        return NoiseRanges(self, as_members(members))


class NoiseRanges(Ensemble):
    """The ensemble of the module. The nearest range replaces a missing member."""

    config: NoiseRangesConfig

    def __init__(self, config: NoiseRangesConfig, members: Members) -> None:
        ranges = config.count
        if len(members) != ranges:
            hint = f"{len(members)} members have {len(members) - 1} boundaries"
            raise ConfigError(describe("boundaries", config.boundaries, f"{ranges} ranges", hint))
        super().__init__(config, members)
        config.times(self.process)
        self._stand_ins = _nearest(self.present)

    @property
    def guides_itself(self) -> bool:
        """Whether a member has a guidance weight of its own."""
        return any(weight is not None for weight in self.config.guidance or ())

    def member_at(self, t: Tensor) -> Tensor:
        """i64 [B]: the range of each t [B] (its member may be missing)."""
        return self.config.range_at(self.process, t)

    def choose(self, x: Tensor, t: Tensor, cond: Condition) -> Routing:
        ids = self._stand_ins.to(t.device)[self.member_at(t)][:, None]
        probs = torch.zeros(len(t), len(self.members), device=t.device).scatter_(1, ids, 1.0)
        gates = torch.ones(len(t), 1, device=t.device)
        return self.record(probs, probs, ids, gates, t, cond)

    def successor(self, index: int) -> int | None:
        later = self.present.nonzero()[:, 0]
        later = later[later > index]
        return int(later[0]) if len(later) else None

    def paired(self, x: Tensor, t: Tensor, cond: Condition, null: Condition) -> Prediction:
        if self.guides_itself:
            hint = "its members have weights of their own; ask it as it is"
            raise ConfigError(describe("guidance", self.config.guidance, "none", hint))
        return super().paired(x, t, cond, null)

    def ask(self, index: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        weight = (self.config.guidance or (None,) * len(self.members))[index]
        if weight is None or weight == 1.0:
            return super().ask(index, x, t, cond)
        strong, weak = with_and_without(_Unguided(self, index), x, t, cond)
        return contrast(self.process, ContrastConfig(weight=weight), x, t, strong, weak)


class _Unguided:
    """One member of an ensemble as a denoiser of the ensemble's process."""

    def __init__(self, ensemble: Ensemble, index: int) -> None:
        self.ensemble, self.index, self.process = ensemble, index, ensemble.process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Ensemble.ask(self.ensemble, self.index, x, t, cond)


def _nearest(present: Tensor) -> Tensor:
    """i64 [K]: who answers in each range: its member, or the nearest that is there (the noisier of
    two)."""
    there = present.nonzero()[:, 0]
    gap = (torch.arange(len(present))[:, None] - there).abs()
    return there[gap.argmin(1)]
