"""Feynman-Kac correctors: weighted, resampled particles on top of any stochastic solver.

The score of a product, power or tilt of densities does not sample that density by itself. Particles
that follow it do once each carries a weight, d log W = (rate of the prediction) d lam (Skreta et
al. 2025, arXiv:2503.02819); resampling keeps the weights from collapsing. The rate is
``Prediction.weight_rate``.

B rows are G systems of K particles, one system after the other. The result of a system depends on
the seeds of its own K particles (and their order) alone. Inside a system particles compete, so
particle k does not depend on seed k alone. Sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt, SerializeAsAny, model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.registry import Part
from coterie.core.rng import SampleNoise, generator
from coterie.process import Process
from coterie.solvers.base import SOLVERS, Estimate, Query, Solver, SolverConfig, SolverState
from coterie.solvers.feynman_kac_record import ParticleRecord
from coterie.solvers.resampling import Scheme, effective_size, log_mean, resample
from coterie.solvers.stochastic import AncestralConfig

DATA_STD = 0.5
"""Of pictures in [-1, 1], about: particles moved by plain ancestral steps are too narrow."""


@dataclass(frozen=True, eq=False)
class ParticleState(SolverState):
    """Solver state with weights; ``inner`` is the state of the solver that moves the particles."""

    inner: SolverState = field(default_factory=SolverState)
    log_weights: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # f64 [G, K]
    log_ratio: Tensor = field(default_factory=lambda: torch.zeros(0))  # f64 [G], before the last
    ancestors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # i64 [G, K]
    step: int = 0

    def index(self, rows: Tensor) -> Self:
        """State of whole systems; weights move with their particles."""
        shape = self.log_weights.shape
        return replace(
            self,
            inner=self.inner.index(rows),
            log_weights=self.log_weights.reshape(-1)[rows].reshape(shape),
            ancestors=self.ancestors.reshape(-1)[rows].reshape(shape),
        )

    def reset(self, rows: Tensor | None = None) -> Self:
        """Reset the inner solver's history; weights stay."""
        return replace(self, inner=self.inner.reset(rows))


@dataclass(eq=False)
class FeynmanKac(Solver):
    """The solver of the module. ``record`` describes the latest run."""

    config: FeynmanKacConfig
    inner: Solver
    record: ParticleRecord = field(default_factory=lambda: ParticleRecord(0, 0))

    stochastic = True

    @property
    def zeta(self) -> float | None:  # type: ignore[override]
        return self.inner.zeta

    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        now = self._state(query, estimate, state)
        start, end = (float(query.process.lam(at.double())) for at in (estimate.t, u))
        # A noise level with no signal has no density to correct.
        change = end - start if math.isfinite(start) else 0.0
        now, clamped = self._weigh(query.process, estimate, now, change)
        moved, inner = self.inner.step(query, estimate, u, now.inner, noise)
        chosen = self._due(now)
        self.record.add(float(estimate.t), now.log_weights, now.ancestors, clamped, chosen)
        after, rows = self._resample(replace(now, inner=inner), chosen, noise)
        return (moved if rows is None else moved[rows]), after

    def land(
        self, query: Query, estimate: Estimate, state: SolverState, noise: SampleNoise | None
    ) -> Tensor:
        """The predicted x0, resampled to equal weights unless ``final`` is "weights"."""
        now = self._state(query, estimate, state)
        # Towards sigma = 0 a rate falls like sigma^2 = exp(-2 lam): its integral is half of it.
        now, clamped = self._weigh(query.process, estimate, now, 0.5)
        chosen = _unequal(now.log_weights) & (self.config.final == "resample")
        self.record.add(float(estimate.t), now.log_weights, now.ancestors, clamped, chosen)
        _, rows = self._resample(now, chosen, noise)
        return estimate.x0 if rows is None else estimate.x0[rows]

    def _state(self, query: Query, estimate: Estimate, state: SolverState) -> ParticleState:
        """The state of a run on its way, or of one that begins here."""
        if isinstance(state, ParticleState):
            return state
        batch = estimate.x.shape[0]
        count = self.config.particles or batch
        check_systems(batch, count, query.cond)
        needed = getattr(query.denoiser, "zeta", None)
        if needed is not None and needed != self.zeta:
            allowed = f"a solver with zeta = {needed}, which the composition holds for"
            raise ConfigError(describe("solver.zeta", self.zeta, allowed))
        systems = batch // count
        self.record = ParticleRecord(count, systems)
        zeros = torch.zeros(systems, count, dtype=torch.float64, device=estimate.x.device)
        first = torch.arange(count, device=estimate.x.device).expand(systems, count)
        return ParticleState(log_weights=zeros, log_ratio=zeros[:, 0], ancestors=first)

    def _weigh(
        self, process: Process, estimate: Estimate, state: ParticleState, change: float
    ) -> tuple[ParticleState, Tensor]:
        """Weights after ``change`` in lam; and the share of increments cut off, f64 [G]."""
        rate = estimate.prediction.weight_rate
        if rate is None or rate.shape != estimate.x.shape[:1]:
            hint = "compose() makes denoisers that know it; guidance over one changes the target"
            found = None if rate is None else tuple(rate.shape)
            raise DataError(describe("prediction.weight_rate", found, "a rate per row", hint))
        unit = process.unit_time(estimate.t.double())
        low, high = self.config.interval
        inside = ((unit >= low) & (unit <= high)).to(rate.device)
        grown = (rate.double() * change * inside).reshape(state.log_weights.shape)
        if not bool(torch.isfinite(grown).all()):
            where = f"step {state.step}, t = {float(estimate.t):.4g}"
            raise DataError(f"particle weights: NaN or infinity at {where}: look at the experts")
        if self.config.clamp is None:
            none = grown.new_zeros(len(grown))
            return replace(state, log_weights=state.log_weights + grown), none
        mean = grown.mean(1, keepdim=True)
        centred = grown - mean
        clipped = centred.clamp(-self.config.clamp, self.config.clamp)
        share = (clipped != centred).double().mean(1)
        return replace(state, log_weights=state.log_weights + mean + clipped), share

    def _due(self, state: ParticleState) -> Tensor:
        """bool [G]: systems whose effective size has fallen below the threshold."""
        least = self.config.ess * state.log_weights.shape[1]
        low = effective_size(state.log_weights) < least
        looked = (state.step + 1) % self.config.every == 0
        return _unequal(state.log_weights) & low & looked

    def _resample(
        self, state: ParticleState, chosen: Tensor, noise: SampleNoise | None
    ) -> tuple[ParticleState, Tensor | None]:
        """The state after this step, and the row i64 [B] that each particle goes on from (None:
        its own)."""
        state = replace(state, step=state.step + 1)
        systems = chosen.nonzero()[:, 0]
        if not len(systems):
            return self._reached(state), None
        if noise is None:
            raise ConfigError(describe("noise", None, "a SampleNoise", "this solver is stochastic"))
        log, count = state.log_weights, state.log_weights.shape[1]
        seeds = [noise.seeds[int(system) * count] for system in systems]
        rngs = [generator(seed, "resample", state.step) for seed in seeds]
        rows = torch.arange(log.numel(), device=log.device).reshape(log.shape).clone()
        first = systems[:, None] * count
        rows[systems] = first + resample(log[systems], self.config.scheme, rngs)
        ratio = torch.where(chosen, state.log_ratio + log_mean(log), state.log_ratio)
        flat = rows.reshape(-1)
        after = replace(
            state,
            inner=state.inner.index(flat),
            log_weights=log.masked_fill(chosen[:, None], 0.0),
            log_ratio=ratio,
            ancestors=state.ancestors.reshape(-1)[flat].reshape(log.shape),
        )
        return self._reached(after), flat

    def _reached(self, state: ParticleState) -> ParticleState:
        record = self.record
        record.log_weights, record.log_ratio = state.log_weights, state.log_ratio
        record.ancestors = state.ancestors
        return state


def _unequal(log_weights: Tensor) -> Tensor:
    """bool [G]: systems whose weights differ; among equal ones there is nothing to resample."""
    return log_weights.amax(1) > log_weights.amin(1)


def check_systems(batch: int, count: int, cond: Condition) -> None:
    """ConfigError unless ``batch`` is a multiple of ``count`` and all particles of a system have
    the same condition."""
    if batch % count:
        allowed = f"a divisor of the {batch} samples drawn together"
        raise ConfigError(describe("particles", count, allowed))
    for name, value in cond.tensors().items():
        systems = value.reshape(batch // count, count, *value.shape[1:])
        if not torch.equal(systems, systems[:, :1].expand_as(systems)):
            allowed = f"one condition for each system of {count} particles"
            raise ConfigError(describe(f"cond.{name}", "several in one system", allowed))


@SOLVERS.register
class FeynmanKacConfig(SolverConfig):
    """Weighted, resampled particles, for sampling products and tilts of densities."""

    kind: Literal["feynman_kac"] = "feynman_kac"
    solver: Annotated[SerializeAsAny[Part], SOLVERS.validator] = AncestralConfig(data_std=DATA_STD)
    """The stochastic solver that moves the particles; by default ancestral with ``data_std``, which
    keeps the variance in few steps."""
    particles: PositiveInt | None = None  # K, particles of a system; null: the whole batch
    scheme: Scheme = "systematic"  # how particles are resampled
    ess: float = Field(0.5, gt=0, le=1)
    """resample below this share of effective particles; 1: always"""
    every: PositiveInt = 1  # steps between checks for resampling
    clamp: float | None = Field(None, gt=0)
    """Cut off log-weight increments further than this from their system's mean, which biases the
    result; null: never."""
    interval: tuple[float, float] = (0.0, 1.0)  # unit times between which weights change
    final: Literal["resample", "weights"] = "resample"  # at the end: resample, or keep the weights

    @model_validator(mode="after")
    def _check(self) -> FeynmanKacConfig:
        if not self.solver.build().zeta:
            hint = "copies of a particle would stay copies; ancestral, sde_dpmpp_1s, sde_dpmpp_2m"
            allowed = "a solver of the reverse equation with noise"
            raise ConfigError(describe("solver", self.solver.kind, allowed, hint))
        if isinstance(self.solver, FeynmanKacConfig):
            raise ConfigError(describe("solver", self.solver.kind, "a solver of one particle"))
        if not 0.0 <= self.interval[0] < self.interval[1]:
            raise ConfigError(describe("interval", self.interval, "[lo, hi] with 0 <= lo < hi"))
        return self

    def build(self) -> FeynmanKac:
        return FeynmanKac(self, self.solver.build())

    def evaluations_per_step(self) -> int | None:
        each: int | None = self.solver.evaluations_per_step()
        return each
