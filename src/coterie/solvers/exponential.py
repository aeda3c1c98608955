"""Solvers that integrate the linear part exactly, in lam = log(alpha/sigma).

With h = lam_u - lam_t. DDIM: Song et al. 2021 (arXiv:2010.02502). DPM-Solver-2: Lu et al. 2022
(arXiv:2206.00927). DPM-Solver++(2M) and its SDE forms: Lu et al. 2022 (arXiv:2211.01095).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coterie.core.rng import SampleNoise
from coterie.process import Process, expand
from coterie.solvers.base import (
    SOLVERS,
    Estimate,
    Query,
    Solver,
    SolverConfig,
    SolverState,
    draw,
    factor,
    members_asked,
)

AtSwitch = Literal["keep", "reset"]


def ddim_move(process: Process, estimate: Estimate, u: Tensor) -> Tensor:
    """alpha_u D + sigma_u E."""
    x = estimate.x
    return factor(process.alpha(u), x) * estimate.x0 + factor(process.sigma(u), x) * estimate.eps


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
    """Deterministic DDIM."""

    kind: Literal["ddim"] = "ddim"

    def build(self) -> Solver:
        return DDIM()


@dataclass(frozen=True)
class DPMSolver2(Solver):
    """Noise prediction at the half step in lam; from alpha = 0 (no half step exists) DDIM."""

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
    """Second-order single-step DPM-Solver."""

    kind: Literal["dpm_solver_2"] = "dpm_solver_2"

    def build(self) -> Solver:
        return DPMSolver2()

    def evaluations_per_step(self) -> int:
        return 2


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++: D extrapolated from the step before (multistep) and, if stochastic, noise.

    ``at_switch`` reset: a sample whose members of an ensemble change takes a first-order step.
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
        h = process.lam(u) - process.lam(t)
        asked = members_asked(estimate.prediction, x.shape[0]) if self.multistep else None
        if self.at_switch == "reset" and asked is not None and state.asked is not None:
            state = state.reset((asked != state.asked).any(1))
        denoised = self._extrapolate(estimate.x0, h, state) if self.multistep else estimate.x0
        ratio, alpha, sigma = (
            process.sigma(u) / process.sigma(t),
            process.alpha(u),
            process.sigma(u),
        )
        if self.stochastic:
            ratio, gain = ratio * torch.exp(-h), -alpha * torch.expm1(-2.0 * h)
        else:
            gain = -alpha * torch.expm1(-h)
        moved = factor(ratio, x) * x + factor(gain, x) * denoised
        if self.stochastic:
            spread = sigma * torch.sqrt(-torch.expm1(-2.0 * h))
            moved = moved + factor(spread, x) * draw(noise, x)
        if not self.multistep:
            return moved, state
        valid = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        return moved, SolverState(previous=estimate.x0, valid=valid, lam_step=h, asked=asked)

    @staticmethod
    def _extrapolate(x0: Tensor, h: Tensor, state: SolverState) -> Tensor:
        """D + (D - D_prev) / (2 r), r = h_prev / h; rows without a valid past keep D."""
        if state.previous is None or state.valid is None or state.lam_step is None:
            return x0
        change = factor(0.5 * h / state.lam_step, x0) * (x0 - state.previous)
        return torch.where(expand(state.valid, x0), x0 + change, x0)


@SOLVERS.register
class DPMPP2MConfig(SolverConfig):
    """DPM-Solver++(2M): second order, one evaluation per step. ``at_switch``: whether a sample
    forgets its last step where other members of an ensemble take over."""

    kind: Literal["dpmpp_2m"] = "dpmpp_2m"
    at_switch: AtSwitch = "keep"

    def build(self) -> Solver:
        return DPMSolverPP(multistep=True, stochastic=False, at_switch=self.at_switch)


@SOLVERS.register
class SDEDPMPP1SConfig(SolverConfig):
    """SDE-DPM-Solver++(1S): the same map as ancestral sampling with eta = 1."""

    kind: Literal["sde_dpmpp_1s"] = "sde_dpmpp_1s"

    def build(self) -> Solver:
        return DPMSolverPP(multistep=False, stochastic=True)


@SOLVERS.register
class SDEDPMPP2MConfig(SolverConfig):
    """SDE-DPM-Solver++(2M); ``at_switch`` as of ``dpmpp_2m``."""

    kind: Literal["sde_dpmpp_2m"] = "sde_dpmpp_2m"
    at_switch: AtSwitch = "keep"

    def build(self) -> Solver:
        return DPMSolverPP(multistep=True, stochastic=True, at_switch=self.at_switch)
