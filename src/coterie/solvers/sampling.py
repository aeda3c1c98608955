"""The sampling loop: a denoiser, a solver and a grid of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.registry import Part
from coterie.core.rng import SampleNoise
from coterie.process import Process
from coterie.solvers.base import SOLVERS, Query, Solver, SolverState, prepared
from coterie.solvers.checks import check_run, check_samples
from coterie.solvers.grids import GRIDS
from coterie.solvers.stepper import Stepper

Callback = Callable[[int, float, Tensor, Prediction], None]
"""Called as (step, t, x, prediction) after the first evaluation of every step."""


def initial_noise(process: Process, shape: Sequence[int], noise: SampleNoise) -> Tensor:
    """f32 [B, *shape]: noise at ``t_max``; row i depends on seed i alone."""
    return process.prior_std() * noise.normal(shape)


@torch.no_grad()
def sample(
    denoiser: DenoiserLike,
    x: Tensor,
    cond: Condition,
    *,
    solver: Part | Solver | str,
    grid: Part | str,
    steps: int | Sequence[int],
    noise: SampleNoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples x0 [B, ...] from the noise ``x`` [B, ...] at the process's ``t_max``.

    ``solver``: a part of SOLVERS, its name, or a built solver; ``grid``: a part of GRIDS or its
    name. ``noise``: for stochastic solvers, one seed per sample, so that sample i does not depend
    on the rest of the batch. Takes ``solver.evaluations(steps)`` denoiser calls. ``steps`` may be
    one number per sample, without ``callback``; a sample then leaves the batch when it is done.
    ConfigError for settings that do not fit each other; DataError if ``x`` or the samples are not
    finite.
    """
    built = solver if isinstance(solver, Solver) else SOLVERS.parse(solver).build()
    grid = GRIDS.parse(grid)
    if isinstance(steps, Sequence):
        made = _sample_apart(denoiser, x, cond, built, grid, list(steps), noise, callback)
    else:
        times = _times(denoiser.process, grid, steps)
        made = integrate(denoiser, x, cond, times, built, noise, callback)
    check_samples(made)
    return made


@lru_cache(maxsize=64, typed=True)
def _kept_times(process: Process, grid: Part, steps: int) -> Tensor:
    built: Tensor = grid.build(process, steps)
    return built


def _times(process: Process, grid: Part, steps: int) -> Tensor:
    """Of a grid, built once: run after run has the same."""
    try:
        return _kept_times(process, grid, steps)
    except TypeError:  # one of them cannot be hashed
        built: Tensor = grid.build(process, steps)
        return built


def _sample_apart(
    denoiser: DenoiserLike,
    x: Tensor,
    cond: Condition,
    solver: Solver,
    grid: Part,
    steps: list[int],
    noise: SampleNoise | None,
    callback: Callback | None,
) -> Tensor:
    if len(steps) != len(x):
        raise ConfigError(describe("steps", steps, f"{len(x)} numbers, one per sample"))
    if callback is not None:
        hint = "samples of different numbers of steps have no step in common"
        raise ConfigError(describe("callback", "given", "None", hint))
    grids = {count: _times(denoiser.process, grid, count) for count in sorted(set(steps))}
    stepper = Stepper(denoiser, solver)
    stepper.admit(x, cond, [grids[count] for count in steps], noise, ids=range(len(x)))
    made = torch.empty_like(x)
    while len(stepper):
        for done in stepper.step():
            made[done.id] = done.x
    return made


def asked_times(process: Process, solver: Part, grid: Part, steps: int | Sequence[int]) -> Tensor:
    """f64 [S]: every time at which the denoiser is called in such a run, in order of first use.

    For several numbers of ``steps``, those of all. ConfigError for solvers that choose their times
    by the predictions.
    """
    if solver.evaluations_per_step() is None:
        hint = "it chooses its own steps"
        raise ConfigError(describe("solver", solver.kind, "one with a fixed number of calls", hint))
    asked: dict[float, None] = {}

    class Listener:
        def __init__(self) -> None:
            self.process = process

        def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
            asked.update(dict.fromkeys(t.tolist()))
            return Prediction(torch.zeros_like(x), "x0")

    x = torch.ones(1, 1, dtype=torch.float64)  # solvers ask in float64 where x is
    for count in sorted(set(steps)) if isinstance(steps, Sequence) else [steps]:
        noise = SampleNoise([0])
        sample(Listener(), x, Condition(), solver=solver, grid=grid, steps=count, noise=noise)
    return torch.tensor(list(asked), dtype=torch.float64)


def integrate(
    denoiser: DenoiserLike,
    x: Tensor,
    cond: Condition,
    times: Tensor,
    solver: Solver,
    noise: SampleNoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The state at ``times[-1]`` from ``x`` at ``times[0]``; times f64 [N+1], strictly monotone.

    A step to sigma = 0 returns the predicted x0. Differentiable (``sample`` is not). Deterministic
    solvers also run from data to noise.
    """
    check_run(denoiser.process, x, cond, times, solver, noise)
    query, state = Query(denoiser, prepared(denoiser, cond)), SolverState()
    steps = len(times) - 1
    lands = float(query.process.sigma(times[-1])) == 0.0
    for step, (start, u) in enumerate(pairwise(times.unbind())):
        x, t = solver.perturb(query.process, x, start, steps, noise)
        estimate = query(x, t)
        if callback is not None:
            callback(step, float(t), x, estimate.prediction)
        if lands and step == steps - 1:
            x = solver.land(query, estimate, state, noise)
        else:
            x, state = solver.step(query, estimate, u, state, noise)
    return x
