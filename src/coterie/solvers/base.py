"""What a solver is: one step t -> u, with explicit state, asking a denoiser through a Query."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.registry import Part, Registry
from coterie.core.rng import SampleNoise
from coterie.core.routing import ENSEMBLE
from coterie.process import Number, Process, affine, expand, remembered, weights

SOLVERS = Registry("solver", "coterie.solvers")


class Estimate:
    """A prediction at (x, t) in every view a solver may want; converted at most once each."""

    __slots__ = ("_views", "prediction", "process", "t", "x")

    def __init__(self, process: Process, x: Tensor, t: Tensor, prediction: Prediction) -> None:
        self.process, self.x, self.t, self.prediction = process, x, t, prediction
        self._views: dict[str, Tensor] = {}

    def _as(self, view: str) -> Tensor:
        made = self._views.get(view)
        if made is None:
            value, source = self.prediction.value, self.prediction.view
            if view == source:
                made = _typed(value, self.x)
            else:
                made = self.mixed(*weights(self.process, affine, self.t, told=(source, view)))
            self._views[view] = made
        return made

    def mixed(self, of_x: Number, of_value: Number) -> Tensor:
        """``of_x`` x + ``of_value`` times what was predicted, in the type of x."""
        return _typed(combined((of_x, self.x), (of_value, self.prediction.value)), self.x)

    @property
    def x0(self) -> Tensor:
        return self._as("x0")

    @property
    def eps(self) -> Tensor:
        return self._as("eps")

    @property
    def flow(self) -> Tensor:
        return self._as("flow")


def _typed(value: Tensor, like: Tensor) -> Tensor:
    return value if value.dtype is like.dtype else value.to(like.dtype)


class Query:
    """Asks one denoiser about one condition, and counts: ``evaluations`` is the NFE so far.

    The denoiser gets t as [B] in float32 (float64 if x is); conversions use t as given, in f64.
    """

    def __init__(self, denoiser: DenoiserLike, cond: Condition) -> None:
        self.denoiser, self.cond = denoiser, cond
        self.process: Process = remembered(denoiser.process)
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Estimate:
        """``t``: 0-dimensional f64, or [B] where particles sit at different times."""
        self.evaluations += 1
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if t.dim() or t.requires_grad:
            rows = t.to(device=x.device, dtype=dtype).expand(x.shape[0])
        else:  # without waiting for a device
            rows = torch.full((x.shape[0],), float(t), dtype=dtype, device=x.device)
        return Estimate(self.process, x, t, self.denoiser(x, rows, self.cond))


@dataclass(frozen=True, eq=False)
class SolverState:
    """What a solver remembers between steps. It belongs to the particles, row by row.

    When particles are resampled, ``index`` it with the same rows; when a particle's denoiser
    changes, ``reset`` that row (its next step is first order).
    """

    previous: Tensor | None = None  # [B, ...], x0 estimate of the step before
    valid: Tensor | None = None  # bool [B], whether ``previous`` may be used; None: all of it
    lam_step: Number | None = None  # length in lam of the step before
    length: Tensor | None = None  # f64 [B], step length of adaptive solvers; NaN: none yet
    asked: Tensor | None = None  # bool [B, K], members of an ensemble that answered before

    def index(self, rows: Tensor) -> Self:
        """State of the particles ``rows`` (i64 or bool [B])."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows.to(value.device)]

        step = self.lam_step
        return dataclasses.replace(
            self,
            previous=pick(self.previous),
            valid=pick(self.valid),
            lam_step=pick(step) if isinstance(step, Tensor) and step.dim() else step,
            length=pick(self.length),
            asked=pick(self.asked),
        )

    def extended(self, count: int) -> Self:
        """With ``count`` new particles at the end, who remember nothing."""

        def grown(value: Tensor | None, fill: float) -> Tensor | None:
            return None if value is None else torch.cat([value, _filled(value, count, fill)])

        step = None
        if self.lam_step is not None and self.previous is not None:
            step = torch.as_tensor(self.lam_step, dtype=torch.float64).expand(len(self.previous))
        return dataclasses.replace(
            self,
            previous=grown(self.previous, 0.0),
            valid=grown(self._valid(), False),
            lam_step=grown(step, 1.0),
            length=grown(self.length, float("nan")),
            asked=grown(self.asked, False),
        )

    def reset(self, rows: Tensor | None = None) -> Self:
        """Forget: everything, or the particles where ``rows`` (bool [B]) is True."""
        valid = self._valid()
        if rows is None or valid is None:
            return type(self)(length=self.length)
        return dataclasses.replace(self, valid=valid & ~rows.to(valid.device))

    def _valid(self) -> Tensor | None:
        if self.valid is not None or self.previous is None:
            return self.valid
        return self.previous.new_ones(len(self.previous), dtype=torch.bool)


def _filled(like: Tensor, count: int, value: float) -> Tensor:
    return like.new_full((count, *like.shape[1:]), value)


def prepared(denoiser: DenoiserLike, cond: Condition) -> Condition:
    """``cond`` with what is static in it worked out, by denoisers that keep such things."""
    prepare = getattr(denoiser, "prepare", None)
    if prepare is None:
        return cond
    made: Condition = prepare(cond)
    return made


def members_asked(prediction: Prediction, batch: int) -> Tensor | None:
    """bool [B, K]: which members of an ensemble answered for each sample; None where there is none.
    Of a batch stacked for guidance, its first half."""
    for routing in prediction.routings:
        if routing.slot == ENSEMBLE:
            return routing.one_hot()[:batch].bool()
    return None


class Solver(ABC):
    """One step of an integrator. ``zeta``: the noise of the reverse equation it follows,

        dx = (-a x + (1 + zeta^2) / 2 g^2 score) ds + zeta g dW,

    in falling time s; 0 is the probability flow, None is none of these.
    """

    stochastic: bool = False
    zeta: float | None = 0.0

    def perturb(
        self,
        process: Process,
        x: Tensor,
        t: Tensor,
        steps: int | Tensor,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, Tensor]:
        """State and time at which the step starts instead (churn); by default as they are.

        ``t`` is 0-dimensional or f64 [B]; ``steps`` of the whole run, then [B] where they differ.
        """
        return x, t

    @abstractmethod
    def step(
        self,
        query: Query,
        estimate: Estimate,
        u: Tensor,
        state: SolverState,
        noise: SampleNoise | None,
    ) -> tuple[Tensor, SolverState]:
        """From ``estimate`` (which holds x and t) to time ``u``, f64, sigma > 0: 0-dimensional, or
        [B] where ``estimate.t`` is."""

    def land(
        self, query: Query, estimate: Estimate, state: SolverState, noise: SampleNoise | None
    ) -> Tensor:
        """The last step, to sigma = 0: the denoised sample, whatever the solver."""
        return estimate.x0


class SolverConfig(Part):
    """Configuration of a solver."""

    def build(self) -> Solver:
        raise TypeError(f"{type(self).__name__} declares no build()")

    def evaluations_per_step(self) -> int | None:
        """Evaluations of the denoiser in one step; None where they depend on the data."""
        return 1

    def evaluations(self, steps: int, to_clean: bool = True) -> int | None:
        """NFE of ``steps`` steps; the last one, to sigma = 0, takes one evaluation."""
        each = self.evaluations_per_step()
        if each is None:
            return None
        return (steps - 1) * each + 1 if to_clean else steps * each


def factor(value: Number, x: Tensor) -> Number:
    """A number of the noise level, a float or f64 [B], ready to multiply x [B, ...]."""
    return value if isinstance(value, float) else expand(value, x).to(x)


def mixture(
    process: Process, t: Tensor, of_x0: Tensor, of_eps: Tensor, view: str
) -> tuple[Tensor, Tensor]:
    """Weights of x and of a prediction in ``view`` at ``t``, so that their sum is
    ``of_x0`` D + ``of_eps`` E."""
    x_of_x0, value_of_x0 = affine(process, t, view, "x0")
    x_of_eps, value_of_eps = affine(process, t, view, "eps")
    return of_x0 * x_of_x0 + of_eps * x_of_eps, of_x0 * value_of_x0 + of_eps * value_of_eps


def combined(*terms: tuple[Number, Tensor]) -> Tensor:
    """Sum of tensors [B, ...], each times a number of the noise level."""
    (weight, x), *rest = terms
    total = x if isinstance(weight, float) and weight == 1.0 else factor(weight, x) * x
    for weight, x in rest:
        if isinstance(weight, float):
            total = torch.add(total, x, alpha=weight)
        else:
            total = total + factor(weight, x) * x
    return total


def draw(noise: SampleNoise | None, x: Tensor) -> Tensor:
    """Standard normal noise like ``x``: drawn as float32 per sample, cast up for float64."""
    if noise is None:
        raise ConfigError(describe("noise", None, "a SampleNoise", "this solver is stochastic"))
    return noise.normal(x.shape[1:]).to(x)
