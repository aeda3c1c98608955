"""Training times inside a range of noise levels, for an expert of that range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import SerializeAsAny, model_validator
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.process.base import Process
from coterie.process.times import TIMES, Times

PROBES = 4096  # draws that tell how much of a distribution lies in a range
LEAST = 0.002  # share of the draws; below it sampling by rejection takes too long


@dataclass(frozen=True)
class _Within:
    inner: Times
    low: float
    high: float

    def sample(self, batch: int, rng: Generator) -> Tensor:
        kept: list[Tensor] = []
        missing = batch
        while missing > 0:
            t = self.inner.sample(max(batch, 64), rng)
            t = t[self.holds(t)][:missing]
            kept.append(t)
            missing -= len(t)
        return torch.cat(kept) if kept else torch.empty(0)

    def holds(self, t: Tensor) -> Tensor:
        return (t >= self.low) & (t < self.high)


@TIMES.register
class WithinTimes(Part):
    """Times of another distribution, restricted to low <= t < high.

    If experts of neighbouring ranges get the shares :func:`share_within` of the samples, together
    they see the distribution that one network would.
    """

    kind: Literal["within"] = "within"
    times: Annotated[SerializeAsAny[Part], TIMES.validator] = "uniform"  # type: ignore[assignment]
    """the distribution to restrict"""
    low: float | None = None  # least time; None: the clean end of the process
    high: float | None = None  # upper limit of the time, excluded; None: the noisy end

    @model_validator(mode="after")
    def _check(self) -> WithinTimes:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(describe("high", self.high, f"above low = {self.low}"))
        if self.times.kind == "stratified":
            hint = "a batch spread over the whole process has few times in a range"
            raise ConfigError(describe("times.kind", "stratified", "times drawn apart", hint))
        return self

    def build(self, process: Process) -> Times:
        """ConfigError if ``times`` hardly ever falls into the range."""
        share = share_within(self, process)
        if share < LEAST:
            allowed = f"a range with at least {LEAST:.1%} of the times of {self.times.kind}"
            raise ConfigError(describe("low, high", (self.low, self.high), allowed))
        return self._within(process)

    def _within(self, process: Process) -> _Within:
        low = -float("inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return _Within(self.times.build(process), low, high)


def share_within(config: WithinTimes, process: Process) -> float:
    """Share of ``config.times`` that falls into the range, estimated from a fixed set of draws."""
    made = config._within(process)
    t = made.inner.sample(PROBES, torch.Generator().manual_seed(0))
    return float(made.holds(t).double().mean())
