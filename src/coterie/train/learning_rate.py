"""Learning-rate schedules: functions of the step alone, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few
from coterie.core.registry import Part, Registry

SCHEDULES = Registry("learning-rate schedule", "coterie.lr_schedules")

Factor = Callable[[float], float]
"""Share of training done, [0, 1] -> multiplier of the learning rate."""


@SCHEDULES.register
class ConstantSchedule(Part):
    """The same learning rate throughout."""

    kind: Literal["constant"] = "constant"

    def build(self) -> Factor:
        return lambda progress: 1.0


@SCHEDULES.register
class LinearSchedule(Part):
    """A straight line from 1 down to ``final``."""

    kind: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1)  # last factor

    def build(self) -> Factor:
        return lambda progress: 1.0 - (1.0 - self.final) * progress


@SCHEDULES.register
class CosineSchedule(Part):
    """Half a cosine from 1 down to ``final``."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)  # last factor

    def build(self) -> Factor:
        def factor(progress: float) -> float:
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))

        return factor


@SCHEDULES.register
class RepeatedSchedule(Part):
    """Another schedule, several times in a row: once for each part that is trained in turn."""

    kind: Literal["repeated"] = "repeated"
    schedule: Annotated[SerializeAsAny[Part], SCHEDULES.validator] = LinearSchedule()
    """the schedule to repeat"""
    times: Few = 5  # number of repetitions

    def build(self) -> Factor:
        inner = self.schedule.build()

        def factor(progress: float) -> float:
            turn = turn_at(progress, self.times)
            return float(inner(min(1.0, max(0.0, progress * self.times - turn))))

        return factor


def turn_at(progress: float, turns: int) -> int:
    """Which of ``turns`` equal parts of training it is, 0 the first."""
    return min(turns - 1, math.floor(progress * turns + 1e-9))


@SCHEDULES.register
class StepSchedule(Part):
    """Multiplied by ``factor`` at every share of training in ``at``."""

    kind: Literal["steps"] = "steps"
    at: tuple[float, ...] = (0.6, 0.85)  # shares of training at which the rate falls
    factor: float = Field(default=0.1, gt=0, le=1)  # factor at each of them

    @model_validator(mode="after")
    def _ordered(self) -> StepSchedule:
        if list(self.at) != sorted(set(self.at)) or not all(0 < share < 1 for share in self.at):
            raise ConfigError(describe("at", self.at, "increasing shares between 0 and 1"))
        return self

    def build(self) -> Factor:
        return lambda progress: self.factor ** sum(progress >= share for share in self.at)


@SCHEDULES.register
class TriStageSchedule(Part):
    """Warm-up, a plateau at 1, and exponential decay (Park et al. 2019, arXiv:1904.08779)."""

    kind: Literal["tri_stage"] = "tri_stage"
    start: float = Field(default=0.1, gt=0, le=1)  # first factor
    final: float = Field(default=1e-6, gt=0, le=1)  # last factor
    warm: float = Field(default=0.02, ge=0, lt=1)  # share of training for warm-up
    hold: float = Field(default=0.08, ge=0, lt=1)  # share of training at factor 1

    @model_validator(mode="after")
    def _leaves_time_to_decay(self) -> TriStageSchedule:
        if self.warm + self.hold >= 1:
            allowed = f"less than {1 - self.warm:g}: the rest of training decays"
            raise ConfigError(describe("hold", self.hold, allowed))
        return self

    def build(self) -> Factor:
        def factor(progress: float) -> float:
            if progress < self.warm:
                return self.start + (1 - self.start) * progress / self.warm
            left = progress - self.warm - self.hold
            return self.final ** max(0.0, left / (1 - self.warm - self.hold))

        return factor
