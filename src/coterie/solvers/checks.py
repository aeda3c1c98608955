"""Checks before and after a sampling run."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.process import Process
from coterie.solvers.base import Solver


def check_run(
    process: Process,
    x: Tensor,
    cond: Condition,
    times: Tensor,
    solver: Solver,
    noise: SampleNoise | None,
) -> None:
    """ConfigError if the arguments of a sampling run do not fit each other, DataError if ``x`` is
    not finite."""
    if times.dim() != 1 or len(times) < 2 or times.dtype != torch.float64:
        allowed = "a float64 vector of at least 2 times"
        raise ConfigError(describe("times", (tuple(times.shape), times.dtype), allowed))
    values = times.tolist()  # a few numbers, for which Python is faster than tensors
    falls = [after < before for before, after in pairwise(values)]
    rises = [after > before for before, after in pairwise(values)]
    if not (all(falls) or all(rises)):
        raise ConfigError(describe("times", values, "strictly falling or rising times"))
    low, high = min(values), max(values)
    slack = 1e-9 * max(1.0, process.t_max)
    if low < process.t_clean - slack or high > process.t_max + slack:
        allowed = f"times in [{process.t_clean:g}, {process.t_max:g}]"
        raise ConfigError(describe("times", (low, high), allowed))
    if solver.stochastic and noise is None:
        raise ConfigError(describe("noise", None, "a SampleNoise", "this solver is stochastic"))
    if noise is not None and len(noise) != x.shape[0]:
        raise ConfigError(describe("noise", len(noise), f"{x.shape[0]} seeds, one per sample"))
    for name, value in cond.tensors().items():
        if value.shape[0] != x.shape[0]:
            allowed = f"{x.shape[0]} rows, one per sample"
            raise ConfigError(describe(f"cond.{name}", value.shape[0], allowed))
    if not bool(torch.isfinite(x).all()):
        raise DataError("x: the initial state has NaN or infinite values")


class NonFiniteSamples(DataError):
    """Samples with NaN or infinity; ``rows`` lists them."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"samples {rows[:8]}: NaN or infinity; look at the denoiser's answers")
        self.rows = rows


def check_samples(x: Tensor) -> None:
    """Raise NonFiniteSamples if samples ``x`` [B, ...] hold NaN or infinity."""
    good = torch.isfinite(x).flatten(1).all(1)
    if not bool(good.all()):
        raise NonFiniteSamples((~good).nonzero()[:, 0].tolist())
