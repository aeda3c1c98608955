"""Sampling a run with exact caches: the same samples in less time."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

import numpy as np
import torch

from coterie.cache import Cache, CacheCost, compile_network, cost
from coterie.cache import cached as cached_denoiser
from coterie.core.errors import ConfigError, describe
from coterie.runs.trained_run import LoadedRun
from coterie.solvers import asked_times


def cached(
    run: LoadedRun, steps: int | None = None, caches: Sequence[Cache] | None = None
) -> tuple[LoadedRun, CacheCost]:
    """``run`` with every exact cache that applies to its model (or those of ``caches``), and their
    savings.

    For the solver and grid of the run and ``steps`` (default: the run's). ``model.caches`` names
    the caches. ConfigError if none applies, or if the solver chooses its own times.
    """
    process = getattr(run.model, "process", None)
    if process is None:
        hint = "this model has no noise level to fold by"
        raise ConfigError(describe("cached", True, "false", hint))
    settings = run.config.sample
    times = asked_times(process, settings.solver, settings.grid, steps or settings.steps)
    example = run.source.get(np.arange(1)).cond
    model = cached_denoiser(run.model, times, example, caches=caches)
    return dataclasses.replace(run, model=model), cost(model)


def compiled(run: LoadedRun) -> LoadedRun:
    """``run`` with a backbone that torch compiles at its first call, which takes a minute on a CPU.

    ConfigError if the model cannot be compiled, or torch's compiler does not work here.
    """
    if getattr(run.model, "backbone", None) is None or run.is_text:
        hint = "only denoisers of samples that are one network are"
        raise ConfigError(describe("compile", True, "false", hint))
    _check_compiler(next(run.model.parameters()).device)
    compile_network(run.model, dynamic=True)
    return run


def _check_compiler(device: torch.device) -> None:
    """Compiles one addition: what is wrong with the tools shows before there is work to lose."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        reason = str(error).partition("\n")[0]
        hint = f"torch needs a C++ compiler, {compiler!r} unless CXX names another; {reason}"
        raise ConfigError(describe("compile", True, "false", hint)) from error
