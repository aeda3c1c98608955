"""Exponential integrators in lam = log(alpha/sigma): DDIM and DPM-Solver.

They integrate the linear part of the equation exactly. h = lam_u - lam_t. DDIM: Song et al. 2021
(arXiv:2010.02502). DPM-Solver-2: Lu et al. 2022 (arXiv:2206.00927). DPM-Solver++(2M) and its SDE
forms: Lu et al. 2022 (arXiv:2211.01095).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
    draw,
    factor,
    members_asked,
    mixture,
)

AtSwitch = Literal["keep", "reset"]


def ddim_move(process: Process, estimate: Estimate, u: Tensor) -> Tensor:
    """alpha_u D + sigma_u E, computed from x and the prediction."""
    return estimate.mixed(*weights(process, _ddim, estimate.t, u, told=(estimate.prediction.view,)))


def _ddim(process: Process, t: Tensor, u: Tensor, view: str) -> tuple[Tensor, Tensor]:
    return mixture(process, t, process.alpha(u), process.sigma(u), view)


@dataclass(frozen=True)
class DDIM(Solver):
    """First order; exact if D is constant over the step."""

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        return ddim_move(query.process, estimate, u), state


@SOLVERS.register
class DDIMConfig(SolverConfig):
    """Deterministic DDIM: first order, one denoiser call per step."""

    kind: Literal["ddim"] = "ddim"

    def build(self) -> Solver:
        return DDIM()


@dataclass(frozen=True)
class DPMSolver2(Solver):
    """Noise prediction at the half step in lam; a DDIM step from alpha = 0, where lam is
    infinite."""

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        process, x, t = query.process, estimate.x, estimate.t
        start, end = process.lam(t), process.lam(u)
        finite = torch.isfinite(start)
        if not bool(finite.any()):
            return ddim_move(process, estimate, u), state
        # A particle at alpha = 0 asks at its own time, and does not use the answer.
        middle = torch.where(finite, process.time_of_lam(0.5 * (start + end)), t)
        half = query(ddim_move(process, estimate, middle), middle)
        growth = process.sigma(u) * torch.expm1(end - start)
        ratio = process.alpha(u) / process.alpha(t)
        moved = factor(ratio, x) * x - factor(growth, x) * half.eps
        if bool(finite.all()):
            return moved, state
        return torch.where(expand(finite, x), moved, ddim_move(process, estimate, u)), state


@SOLVERS.register
class DPMSolver2Config(SolverConfig):
    """DPM-Solver-2: second order, two denoiser calls per step."""

    kind: Literal["dpm_solver_2"] = "dpm_solver_2"

    def build(self) -> Solver:
        return DPMSolver2()

    def evaluations_per_step(self) -> int:
        return 2


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++: with ``multistep``, D is extrapolated from the step before; ``stochastic`` adds
    noise.

    ``at_switch`` reset: a sample takes a first-order step when its ensemble members change.
    """

    multistep: bool
    stochastic: bool
    at_switch: AtSwitch = "keep"

    @property
    def zeta(self) -> float:  # type: ignore[override]
        return 1.0 if self.stochastic else 0.0

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        process, x, t = query.process, estimate.x, estimate.t
        asked = members_asked(estimate.prediction, x.shape[0]) if self.multistep else None
        if self.at_switch == "reset" and asked is not None and state.asked is not None:
            state = state.reset((asked != state.asked).any(1))
        before = math.inf if state.lam_step is None else state.lam_step
        made = weights(process, _dpmpp, t, u, before, told=(self.stochastic,))
        h, ratio, gain, change, spread = made
        terms = [(ratio, x), (gain, estimate.x0)]
        if self.multistep and state.previous is not None:
            if state.valid is not None:  # rows without a past keep D
                own = torch.as_tensor(change, dtype=torch.float64, device=state.valid.device)
                change = torch.where(state.valid, own, 0.0)
            terms[1:] = [(gain + change, estimate.x0), (-change, state.previous)]
        if self.stochastic:
            terms.append((spread, draw(noise, x)))
        moved = combined(*terms)
        if not self.multistep:
            return moved, state
        return moved, SolverState(previous=estimate.x0, lam_step=h, asked=asked)


def _dpmpp(
    process: Process, t: Tensor, u: Tensor, before: Number, stochastic: bool
) -> tuple[Tensor, ...]:
    """h, and the weights of x, D, D - D_prev and the noise: D + (D - D_prev) / (2 r) stands in the
    place of D, r = ``before`` / h."""
    h = process.lam(u) - process.lam(t)
    ratio, alpha, sigma = process.sigma(u) / process.sigma(t), process.alpha(u), process.sigma(u)
    if stochastic:
        ratio, gain = ratio * torch.exp(-h), -alpha * torch.expm1(-2.0 * h)
    else:
        gain = -alpha * torch.expm1(-h)
    spread = sigma * torch.sqrt(-torch.expm1(-2.0 * h).clamp_max(0.0))
    return h, ratio, gain, gain * 0.5 * h / before, spread


@SOLVERS.register
class DPMPP2MConfig(SolverConfig):
    """DPM-Solver++(2M): second order, one denoiser call per step."""

    kind: Literal["dpmpp_2m"] = "dpmpp_2m"
    at_switch: AtSwitch = "keep"
    """``reset``: a sample drops the step before when other members of an ensemble take over."""

    def build(self) -> Solver:
        return DPMSolverPP(multistep=True, stochastic=False, at_switch=self.at_switch)


@SOLVERS.register
class SDEDPMPP1SConfig(SolverConfig):
    """SDE-DPM-Solver++(1S): first order with noise; equals ancestral sampling with eta = 1."""

    kind: Literal["sde_dpmpp_1s"] = "sde_dpmpp_1s"

    def build(self) -> Solver:
        return DPMSolverPP(multistep=False, stochastic=True)


@SOLVERS.register
class SDEDPMPP2MConfig(SolverConfig):
    """SDE-DPM-Solver++(2M): second order with noise, one denoiser call per step."""

    kind: Literal["sde_dpmpp_2m"] = "sde_dpmpp_2m"
    at_switch: AtSwitch = "keep"  # As in ``dpmpp_2m``

    def build(self) -> Solver:
        return DPMSolverPP(multistep=True, stochastic=True, at_switch=self.at_switch)
