"""Training times inside a range of noise levels: what an expert of that range is trained on."""

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
    """``times`` given that low <= t < high; None: to the end of the process.

    Experts of neighbouring ranges trained so see, in proportion, what one network would: the
    shares of the samples that fall into their ranges are :func:`share_within`.
    """

    kind: Literal["within"] = "within"
    times: Annotated[SerializeAsAny[Part], TIMES.validator] = "uniform"  # type: ignore[assignment]
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _check(self) -> WithinTimes:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(describe("high", self.high, f"above low = {self.low}"))
        if self.times.kind == "stratified":
            hint = "a batch spread over the whole process has few times in a range"
            raise ConfigError(describe("times.kind", "stratified", "times drawn apart", hint))
        return self

    def build(self, process: Process) -> Times:
        """ConfigError if next to nothing of ``times`` lies in the range."""
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
    """Share of ``config.times`` that falls into the range, from draws that are always the same."""
    made = config._within(process)
    t = made.inner.sample(PROBES, torch.Generator().manual_seed(0))
    return float(made.holds(t).double().mean())
