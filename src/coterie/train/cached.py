"""A run that samples through a cache: the same samples, with what is known beforehand left out."""

from __future__ import annotations

import dataclasses

import numpy as np

from coterie.cache import CacheCost, cost, fold_by_step
from coterie.core.errors import ConfigError, describe
from coterie.solvers import asked_times
from coterie.train.run import LoadedRun


def cached(run: LoadedRun, steps: int | None = None) -> tuple[LoadedRun, CacheCost]:
    """``run`` with its routing folded for the solver, grid and ``steps`` (default: its own) it
    samples with, and what that saves.

    ConfigError where the model's routers see more than the noise level, it has no experts, or its
    solver chooses its own times.
    """
    process = getattr(run.model, "process", None)
    if process is None:
        hint = "this model has no noise level to fold by"
        raise ConfigError(describe("cached", True, "false", hint))
    settings = run.config.sample
    times = asked_times(process, settings.solver, settings.grid, steps or settings.steps)
    folded = fold_by_step(run.model, times, run.source.get(np.arange(1)).cond)
    return dataclasses.replace(run, model=folded), cost(folded)
