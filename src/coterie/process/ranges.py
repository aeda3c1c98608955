"""Division of the noise levels into ranges, one per expert.

Shapes: B batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.process.base import Process

ROUNDING = 1e-6
"""A time that was rounded to float32 still lies on the boundary it was meant to lie on."""


class RangesConfig(Config):
    """K ranges of noise levels, given by the K - 1 boundaries between them."""

    boundaries: tuple[float, ...] = ()
    """Levels from noisy to clean: falling in ``t`` and ``sigma``, rising in ``log_snr``. A level on
    a boundary belongs to the noisier range."""
    boundaries_in: Literal["t", "sigma", "log_snr"] = "t"
    """Unit of the boundaries: process time, sigma / alpha, or log(alpha^2 / sigma^2)."""

    @model_validator(mode="after")
    def _in_order(self) -> RangesConfig:
        sign = -1.0 if self.boundaries_in == "log_snr" else 1.0
        if not all(sign * a > sign * b for a, b in pairwise(self.boundaries)):
            allowed = "levels from noisy to clean, all different"
            hint = f"{self.boundaries_in} {'rises' if sign < 0 else 'falls'} on that way"
            raise ConfigError(describe("boundaries", self.boundaries, allowed, hint))
        return self

    @property
    def count(self) -> int:
        return len(self.boundaries) + 1

    def range_at(self, process: Process, t: Tensor) -> Tensor:
        """i64 [B]: the range of each time t [B]; 0 is the noisiest."""
        level = _level(process, t.double(), self.boundaries_in)
        falling = -1.0 if self.boundaries_in == "log_snr" else 1.0
        edges = level.new_tensor(self.boundaries)
        slack = ROUNDING * edges.abs().clamp_min(1e-3)
        below = falling * level[:, None] < falling * edges - slack
        return below.sum(1)

    def times(self, process: Process) -> list[float]:
        """The boundaries as times of ``process``. ConfigError if one is outside its times, which
        would leave a range empty."""
        with torch.device("cpu"):  # numbers, also where a model is built without memory
            levels = torch.tensor(self.boundaries, dtype=torch.float64)
            if self.boundaries_in != "t":
                ratio = -levels.log() if self.boundaries_in == "sigma" else levels / 2.0
                levels = process.time_of_lam(ratio)
        for written, t in zip(self.boundaries, levels.tolist(), strict=True):
            if not process.t_min < t <= process.t_max:
                with torch.device("cpu"):
                    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
                    low, high = _level(process, ends, self.boundaries_in).tolist()
                what = "times" if self.boundaries_in == "t" else self.boundaries_in
                allowed = f"{what} above {low:g}, up to {high:g}"
                if self.boundaries_in == "log_snr":
                    allowed = f"log_snr from {high:g}, below {low:g}"
                hint = "a range beyond it would hold no noise level"
                raise ConfigError(describe("boundaries", written, allowed, hint))
        return [float(t) for t in levels.tolist()]


def equal_ranges(process: Process, count: int) -> RangesConfig:
    """``count`` ranges with equal numbers of the process's steps 0..T-1.

    Range n, counted from the clean end, holds the steps in [n T / count, (n + 1) T / count).
    """
    steps = process.num_steps
    if not 1 <= count <= steps:
        raise ConfigError(describe("ranges", count, f"1..{steps}, the steps of the process"))
    first = [-(-n * steps // count) for n in range(count - 1, 0, -1)]  # n T / count or the next
    with torch.device("cpu"):
        times = process.time_of_index(torch.tensor(first, dtype=torch.long), torch.float64)
    return RangesConfig(boundaries=tuple(float(t) for t in times.tolist()))


def _level(process: Process, t: Tensor, unit: str) -> Tensor:
    if unit == "t":
        return t
    lam = process.lam(t)
    return torch.exp(-lam) if unit == "sigma" else 2.0 * lam
