"""The configuration of the training loop."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few, Period
from coterie.core.registry import Part
from coterie.train.learning_rate import SCHEDULES, ConstantSchedule


def _decays(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, int | float) else value


class TrainConfig(Config):
    """How a model is trained; what is learnt is the objective's business."""

    free: ClassVar[tuple[str, ...]] = (
        "log_every",
        "checkpoint_every",
        "keep",
        "nonfinite_limit",
        "threads",
        "tensorboard",
    )
    """Fields that may differ when a run is resumed: they do not change what is learnt."""

    steps: int = Field(default=1000, ge=0, le=2**40)  # optimiser steps; 0 = the model is as it is
    batch: int = Field(default=64, ge=1)  # samples per optimiser step, all micro-batches together
    accumulate: Few = 1  # micro-batches per optimiser step
    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)  # on tensors of two or more dimensions
    warmup: int = Field(default=0, ge=0, le=2**40)  # steps of linear warm-up
    schedule: Annotated[SerializeAsAny[Part], SCHEDULES.validator] = ConstantSchedule()
    clip: float | None = Field(default=1.0, gt=0)  # largest gradient norm; None = off
    freeze: tuple[str, ...] = ()  # shell patterns of modules that stay as they are, in eval mode
    ema: Annotated[tuple[float, ...], BeforeValidator(_decays)] = (0.999,)  # one, several, none
    ema_warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) at update n
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"  # "auto" = cuda where there is one, else cpu
    compile: bool = False
    threads: int | None = Field(default=None, ge=1, le=4096)  # None = chosen by timing steps
    num_bins: Few = 8  # loss is reported per noise-level bin
    log_every: Period = 20
    checkpoint_every: Period = 500
    keep: Period = 3  # newest checkpoints kept
    nonfinite_limit: Period = 3  # consecutive skipped steps before stopping
    tensorboard: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch % self.accumulate:
            allowed = f"a divisor of batch ({self.batch})"
            raise ConfigError(describe("accumulate", self.accumulate, allowed))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(describe("betas", self.betas, "two numbers in [0, 1)"))
        if not all(0 <= decay < 1 for decay in self.ema) or len(set(self.ema)) < len(self.ema):
            raise ConfigError(describe("ema", self.ema, "different decays in [0, 1), or null"))
        return self

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step ``step`` (0-based): schedule times linear warm-up."""
        factor = self.schedule.build()(step / self.steps)
        return self.lr * factor * min(1.0, (step + 1) / (self.warmup + 1))
