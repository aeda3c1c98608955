"""Runge-Kutta solvers of the probability flow ODE dx/dt = flow(x, t), one tableau each.

``rk45`` (Dormand and Prince 1980) chooses its own substeps between grid times, for each sample
alone, so a sample does not depend on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.rng import SampleNoise
from coterie.process import Number, Process, expand, weights
from coterie.solvers.base import (
    SOLVERS,
    Estimate,
    Query,
    Solver,
    SolverConfig,
    SolverState,
    combined,
)


@dataclass(frozen=True)
class Tableau:
    """Explicit method: stage i sits at t + c[i] h, at x + h sum_j a[i-1][j] k_j; result weights b.

    ``error``: weights of the difference to the embedded lower-order method.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()

    @property
    def c(self) -> tuple[float, ...]:
        return (0.0, *(sum(row) for row in self.a))


TABLEAUS = {
    "euler": Tableau(1, (), (1.0,)),
    "midpoint": Tableau(2, ((0.5,),), (0.0, 1.0)),
    "heun": Tableau(2, ((1.0,),), (0.5, 0.5)),
    "rk4": Tableau(4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "rk45": Tableau(
        5,
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (
            71 / 57600,
            0.0,
            -71 / 16695,
            71 / 1920,
            -17253 / 339200,
            22 / 525,
            -1 / 40,
        ),
    ),
}


def _moved(x: Tensor, h: Number, shares: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """x + h times the weighted sum of the slopes."""
    used = [(share * h, slope) for share, slope in zip(shares, slopes) if share]
    return combined((1.0, x), *used)


def _stages(
    tableau: Tableau, query: Query, x: Tensor, t: Tensor, h: Number, first: Tensor
) -> list[Tensor]:
    """Slopes of all stages; ``t`` 0-dimensional or [B]."""
    slopes = [first]
    for row, c in zip(tableau.a, tableau.c[1:]):
        slopes.append(query(_moved(x, h, row, slopes), t + c * h).flow)
    return slopes


def _length(process: Process, t: Tensor, u: Tensor) -> tuple[Tensor]:
    return (u - t,)


@dataclass(frozen=True)
class RungeKutta(Solver):
    """Fixed-step explicit Runge-Kutta method."""

    tableau: Tableau

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        x, t = estimate.x, estimate.t
        (h,) = weights(query.process, _length, t, u)
        slopes = _stages(self.tableau, query, x, t, h, estimate.flow)
        return _moved(x, h, self.tableau.b, slopes), state


class _RungeKuttaConfig(SolverConfig):
    def build(self) -> Solver:
        return RungeKutta(TABLEAUS[self.kind])

    def evaluations_per_step(self) -> int:
        return len(TABLEAUS[self.kind].b)


@SOLVERS.register
class EulerConfig(_RungeKuttaConfig):
    """Euler: first order, one denoiser call per step."""

    kind: Literal["euler"] = "euler"


@SOLVERS.register
class MidpointConfig(_RungeKuttaConfig):
    """Midpoint: second order, two denoiser calls per step."""

    kind: Literal["midpoint"] = "midpoint"


@SOLVERS.register
class HeunConfig(_RungeKuttaConfig):
    """Heun: second order, two denoiser calls per step (EDM's solver, arXiv:2206.00364)."""

    kind: Literal["heun"] = "heun"


@SOLVERS.register
class RK4Config(_RungeKuttaConfig):
    """The classical Runge-Kutta method: fourth order, four denoiser calls per step."""

    kind: Literal["rk4"] = "rk4"


@dataclass(frozen=True)
class AdaptiveRungeKutta(Solver):
    """An embedded Runge-Kutta pair that controls the step length of each sample."""

    tableau: Tableau
    rtol: float
    atol: float
    max_substeps: int

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        x, slope = estimate.x, estimate.flow
        t = estimate.t.to(x.device).expand(x.shape[0]).double()
        goal, sign = u.to(x.device), torch.sign(u - estimate.t).to(x.device)
        length = (goal - t).abs() if state.length is None else state.length
        length = torch.where(length.isnan(), (goal - t).abs(), length)  # of a particle that is new
        for _ in range(self.max_substeps):
            left = (goal - t).abs()
            if not bool((left > 0).any()):
                return x, replace(state, length=length)
            last = length >= left
            h = sign * torch.where(last, left, length)
            slopes = _stages(self.tableau, query, x, t, h, slope)
            moved = _moved(x, h, self.tableau.b, slopes)
            error = self._error(h, slopes, x, moved)
            accept = (error <= 1.0) & (left > 0)
            growth = (0.9 * error.clamp_min(1e-10) ** (-1.0 / self.tableau.order)).clamp(0.2, 5.0)
            # A last, shortened substep says little about the next interval's length.
            grown = torch.where(
                accept & last, torch.maximum(length, h.abs() * growth), h.abs() * growth
            )
            length = torch.where(left > 0, grown, length)
            t = torch.where(accept, torch.where(last, goal, t + h), t)
            rows = expand(accept, x)
            x, slope = torch.where(rows, moved, x), torch.where(rows, slopes[-1], slope)
        hint = "raise the tolerances or max_substeps"
        raise ConfigError(
            describe("solver.max_substeps", self.max_substeps, "enough for rtol and atol", hint)
        )

    def land(
        self, query: Query, estimate: Estimate, state: SolverState, noise: SampleNoise | None
    ) -> Tensor:
        """Integrate to the process's least noise level; there the predicted x0."""
        t, least = estimate.t, query.process.t_min
        if not bool((t > least).any()):
            return estimate.x0
        u = t.clamp_max(least)
        x, _ = self.step(query, estimate, u, state, noise)
        return query(x, u).x0

    def _error(self, h: Tensor, slopes: list[Tensor], x: Tensor, moved: Tensor) -> Tensor:
        """f64 [B]: root mean square of error / tolerance."""
        scale = self.atol + self.rtol * torch.maximum(x.abs(), moved.abs())
        error = _moved(torch.zeros_like(x), h, self.tableau.error, slopes) / scale
        return error.double().flatten(1).square().mean(1).sqrt()


@SOLVERS.register
class RK45Config(SolverConfig):
    """Adaptive Dormand-Prince 5(4): substeps between grid times, by error tolerance."""

    kind: Literal["rk45"] = "rk45"
    rtol: float = Field(1e-5, gt=0)  # relative error tolerance per substep
    atol: float = Field(1e-5, gt=0)  # absolute error tolerance per substep
    max_substeps: int = Field(1000, ge=1, le=10**6)  # most substeps per grid step

    def build(self) -> Solver:
        return AdaptiveRungeKutta(TABLEAUS["rk45"], self.rtol, self.atol, self.max_substeps)

    def evaluations_per_step(self) -> int | None:
        return None
