"""The sampling loop: a denoiser, a solver and a grid of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.registry import Part
from coterie.core.rng import SampleNoise
from coterie.process import Process
from coterie.solvers.base import Query, Solver, SolverState

Callback = Callable[[int, float, Tensor, Prediction], None]
"""Called as (step, t, x, prediction) after the first evaluation of every step."""


def initial_noise(process: Process, shape: Sequence[int], noise: SampleNoise) -> Tensor:
    """f32 [B, *shape]: the state at ``t_max``; row i depends on seed i alone."""
    return process.prior_std() * noise.normal(shape)


@torch.no_grad()
def sample(
    denoiser: DenoiserLike,
    x: Tensor,
    cond: Condition,
    *,
    solver: Part | Solver,
    grid: Part,
    steps: int,
    noise: SampleNoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """x0 [B, ...] from the initial state ``x`` [B, ...] at the process's ``t_max``.

    ``solver`` is a part of SOLVERS, or built from one; ``grid`` is a part of GRIDS. ``noise`` is
    for stochastic solvers: one seed per sample, so sample i does not depend on its batch mates.
    Costs ``solver.evaluations(steps)`` calls of the denoiser. Raises ConfigError for settings
    that do not fit each other and DataError for a non-finite ``x``.
    """
    times = grid.build(denoiser.process, steps)
    built = solver if isinstance(solver, Solver) else solver.build()
    return integrate(denoiser, x, cond, times, built, noise, callback)


def asked_times(process: Process, solver: Part, grid: Part, steps: int) -> Tensor:
    """f64 [S]: every time at which such a run asks its denoiser, in the order of first asking.

    ConfigError for solvers that choose their times by what they are answered.
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
    sample(
        Listener(), x, Condition(), solver=solver, grid=grid, steps=steps, noise=SampleNoise([0])
    )
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

    A step to sigma = 0 takes the denoised sample, whatever the solver. Differentiable (``sample``
    is not). Deterministic solvers also run from data to noise.
    """
    _check(denoiser.process, x, cond, times, solver, noise)
    query, state = Query(denoiser, cond), SolverState()
    steps = len(times) - 1
    for step in range(steps):
        u = times[step + 1]
        x, t = solver.perturb(query.process, x, times[step], steps, noise)
        estimate = query(x, t)
        if callback is not None:
            callback(step, float(t), x, estimate.prediction)
        if float(query.process.sigma(u)) == 0.0:
            x = solver.land(query, estimate, state, noise)
        else:
            x, state = solver.step(query, estimate, u, state, noise)
    return x


def _check(
    process: Process,
    x: Tensor,
    cond: Condition,
    times: Tensor,
    solver: Solver,
    noise: SampleNoise | None,
) -> None:
    if times.dim() != 1 or len(times) < 2 or times.dtype != torch.float64:
        allowed = "a float64 vector of at least 2 times"
        raise ConfigError(describe("times", (tuple(times.shape), times.dtype), allowed))
    change = times.diff()
    if not bool((change < 0).all() or (change > 0).all()):
        raise ConfigError(describe("times", times.tolist(), "strictly falling or rising times"))
    low, high = float(times.min()), float(times.max())
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
