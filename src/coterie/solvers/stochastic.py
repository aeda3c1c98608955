"""Solvers that add noise: ancestral (DDPM at eta = 1) and EDM's churn.

Ancestral: Ho et al. 2020 (arXiv:2006.11239) and Song et al. 2021 (arXiv:2010.02502, eq. 12-16), for
any (alpha, sigma). The step uses the mean D of x0 given x. The variance of x0 given x is ignored
(then few steps make samples too narrow), or estimated from the data's standard deviation (Bao et
al. 2022, arXiv:2201.06503, theorem 1). Churn: Karras et al. 2022 (arXiv:2206.00364, algorithm 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.rng import SampleNoise
from coterie.process import Process, learned_log_variance, transition, weights
from coterie.solvers.base import (
    SOLVERS,
    Estimate,
    Query,
    Solver,
    SolverConfig,
    SolverState,
    combined,
    draw,
    factor,
    mixture,
)
from coterie.solvers.runge_kutta import TABLEAUS, RungeKutta


@dataclass(frozen=True)
class Ancestral(Solver):
    """x = alpha_u D + sqrt(sigma_u^2 - s^2) E + s z with s^2 = eta^2 times the posterior variance.

    With ``data_std`` the noise also covers the variance of x0 given x, for Gaussian data of that
    standard deviation. At eta = 1 on a discrete process a learned variance is used.
    """

    eta: float
    data_std: float = 0.0

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def zeta(self) -> float:  # type: ignore[override]
        return self.eta

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        process, x, t = query.process, estimate.x, estimate.t
        told = (estimate.prediction.view, self.eta, self.data_std)
        of_x, of_value, spread = weights(process, _ancestral, t, u, told=told)
        mean = estimate.mixed(of_x, of_value)
        if not self.stochastic:
            return mean, state
        learned = estimate.prediction.variance
        if learned is None or self.eta != 1.0 or not process.discrete:
            return combined((1.0, mean), (spread, draw(noise, x))), state
        step = transition(process, t, u)
        posterior, forward = step.var_posterior.to(x), step.var_forward.to(x)
        std = torch.exp(0.5 * learned_log_variance(learned, posterior, forward))
        return mean + std * draw(noise, x), state


def _ancestral(
    process: Process, t: Tensor, u: Tensor, view: str, eta: float, data_std: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x, of what was predicted, and of the noise."""
    var = eta**2 * transition(process, t, u).var_posterior
    rest = (process.sigma(u).square() - var).clamp_min(0.0).sqrt()
    made = mixture(process, t, process.alpha(u), rest, view)
    if data_std:
        alpha, sigma = process.alpha(t), process.sigma(t)
        of_x0 = process.alpha(u) - rest * alpha / sigma
        spread = (data_std * sigma).square() / ((data_std * alpha).square() + sigma.square())
        var = var + of_x0.square() * spread
    return *made, var.sqrt()


@SOLVERS.register
class AncestralConfig(SolverConfig):
    """Ancestral sampling: DDPM at ``eta`` 1 (with learned variances if predicted), DDIM at 0."""

    kind: Literal["ancestral"] = "ancestral"
    eta: float = Field(1.0, ge=0, le=1)  # share of the noise added back
    data_std: float = Field(0.0, ge=0, le=1e3)
    """Standard deviation of the data, to add the variance of x0 given x; 0, as published, makes
    samples too narrow in few steps."""

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.data_std and not self.eta:
            raise ConfigError(describe("data_std", self.data_std, "0 without noise (eta 0)"))
        return self

    def build(self) -> Solver:
        return Ancestral(self.eta, self.data_std)


@dataclass(frozen=True)
class Churn(Solver):
    """Noise is added before each Heun step. Levels are s = sigma / alpha."""

    churn: float
    s_min: float
    s_max: float
    noise_scale: float

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.churn > 0

    @property
    def zeta(self) -> float | None:  # type: ignore[override]
        return None if self.stochastic else 0.0

    def perturb(
        self,
        process: Process,
        x: Tensor,
        t: Tensor,
        steps: int | Tensor,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, Tensor]:
        s = torch.exp(-process.lam(t))
        inside = (s >= self.s_min) & (s <= self.s_max)
        if self.churn == 0.0 or not bool(inside.any()):
            return x, t
        if t.dim() == 0:
            return self._raise(process, x, t, steps, noise)
        # Particles outside draw no noise, so that each draws what it would draw alone.
        rows = inside.nonzero()[:, 0]
        count = steps[rows] if isinstance(steps, Tensor) else steps
        own = None if noise is None else noise.index(rows)
        moved, raised = self._raise(process, x[rows], t[rows], count, own)
        return x.index_copy(0, rows.to(x.device), moved), t.index_copy(0, rows, raised)

    def _raise(
        self,
        process: Process,
        x: Tensor,
        t: Tensor,
        steps: int | Tensor,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, Tensor]:
        share = self.churn / torch.as_tensor(steps, dtype=torch.float64)
        gamma = share.clamp(max=math.sqrt(2.0) - 1.0)
        raised = process.time_of_lam(process.lam(t) - torch.log1p(gamma))
        raised = raised.clamp(max=process.t_max)
        ratio = process.alpha(raised) / process.alpha(t)
        added = process.sigma(raised).square() - (ratio * process.sigma(t)).square()
        std = self.noise_scale * added.clamp_min(0.0).sqrt()
        return factor(ratio, x) * x + factor(std, x) * draw(noise, x), raised

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        return RungeKutta(TABLEAUS["heun"]).step(query, estimate, u, state, noise)


@SOLVERS.register
class ChurnConfig(SolverConfig):
    """EDM's stochastic sampler: noise is added before each Heun step."""

    kind: Literal["edm_churn"] = "edm_churn"
    churn: float = Field(40.0, ge=0)  # amount of noise over the whole run; 0: Heun
    s_min: float = Field(0.05, ge=0)  # least sigma / alpha at which noise is added
    s_max: float = Field(50.0, gt=0)  # largest sigma / alpha at which noise is added
    noise_scale: float = Field(1.003, gt=0)  # factor of the added noise

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.s_max < self.s_min:
            raise ConfigError(describe("s_max", self.s_max, f"at least s_min = {self.s_min}"))
        return self

    def build(self) -> Solver:
        return Churn(self.churn, self.s_min, self.s_max, self.noise_scale)

    def evaluations_per_step(self) -> int:
        return 2
