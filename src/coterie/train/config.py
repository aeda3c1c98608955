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
    """How a model is trained; the loss is the run's ``objective``."""

    free: ClassVar[tuple[str, ...]] = (
        "log_every",
        "checkpoint_every",
        "keep",
        "nonfinite_limit",
        "threads",
        "tensorboard",
    )
    """Fields that may differ when a run is resumed, as they do not change the trained weights."""

    steps: int = Field(default=1000, ge=0, le=2**40)  # optimiser steps; 0: keep the initial weights
    batch: int = Field(default=64, ge=1)  # samples per optimiser step, over all micro-batches
    accumulate: Few = 1  # micro-batches per optimiser step
    optimizer: Literal["adamw"] = "adamw"  # AdamW
    lr: float = Field(default=1e-3, gt=0)  # learning rate after warm-up, times the schedule
    betas: tuple[float, float] = (0.9, 0.999)  # decay of AdamW's two averages
    eps: float = Field(default=1e-8, gt=0)  # added to AdamW's denominator
    weight_decay: float = Field(default=0.0, ge=0)  # on tensors of two or more dimensions
    warmup: int = Field(default=0, ge=0, le=2**40)  # steps of linear warm-up
    schedule: Annotated[SerializeAsAny[Part], SCHEDULES.validator] = ConstantSchedule()
    """factor of the learning rate over training"""
    clip: float | None = Field(default=1.0, gt=0)  # largest gradient norm; None = off
    freeze: tuple[str, ...] = ()  # patterns of modules that are not trained, in eval mode
    ema: Annotated[tuple[float, ...], BeforeValidator(_decays)] = (0.999,)
    """decays of weight averages; one, several or none"""
    ema_warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) at update n
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; auto: bfloat16 on GPUs that have it"""
    device: str = "auto"  # "auto" = cuda where there is one, else cpu
    compile: bool = False  # compile the network with torch.compile
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads; null: chosen by timing steps"""
    num_bins: Few = 8  # noise-level bins for which the loss is logged
    log_every: Period = 20  # steps between lines of metrics.jsonl
    checkpoint_every: Period = 500  # steps between checkpoints
    keep: Period = 3  # number of newest checkpoints that are kept
    nonfinite_limit: Period = 3  # skipped steps in a row after which training stops
    tensorboard: bool = False  # also write TensorBoard event files

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
        """Learning rate of optimiser step ``step`` (from 0): schedule times linear warm-up."""
        factor = self.schedule.build()(step / self.steps)
        return self.lr * factor * min(1.0, (step + 1) / (self.warmup + 1))
