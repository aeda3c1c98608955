"""The interface of solvers: one step from time t to u with explicit state."""

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
    """A prediction at (x, t), converted to other views when needed, once each."""

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
        """``of_x`` x + ``of_value`` times the prediction, in the dtype of x."""
        return _typed(combined((of_x, self.x), (of_value, self.prediction.value)), self.x)

    @property
    def x0(self) -> Tensor:
        """Predicted clean data, [B, ...]."""
        return self._as("x0")

    @property
    def eps(self) -> Tensor:
        """Predicted noise, [B, ...]."""
        return self._as("eps")

    @property
    def flow(self) -> Tensor:
        """dx/dt of the probability flow, [B, ...]."""
        return self._as("flow")


def _typed(value: Tensor, like: Tensor) -> Tensor:
    return value if value.dtype is like.dtype else value.to(like.dtype)


class Query:
    """Calls a denoiser with a fixed condition; ``evaluations`` counts the calls (NFE).

    The denoiser gets t as [B] in float32 (float64 if x is); conversions use t in float64.
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
    """What a solver keeps between steps, row by row for each sample.

    If particles are resampled, ``index`` the state with the same rows. If another denoiser takes
    over a sample, ``reset`` its row; its next step is first order.
    """

    previous: Tensor | None = None  # [B, ...], x0 predicted in the step before
    valid: Tensor | None = None  # bool [B], whether ``previous`` may be used; None: all
    lam_step: Number | None = None  # length of the step before, in lam
    length: Tensor | None = None  # f64 [B], step length of adaptive solvers; NaN: none yet
    asked: Tensor | None = None  # bool [B, K], ensemble members used in the step before

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
        """The state with ``count`` new rows at the end, which start without history."""

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
        """Drop the history of all samples, or of those where ``rows`` (bool [B]) is True."""
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
    """``cond`` after the denoiser's ``prepare``, if it has one: static parts are computed once."""
    prepare = getattr(denoiser, "prepare", None)
    if prepare is None:
        return cond
    made: Condition = prepare(cond)
    return made


def members_asked(prediction: Prediction, batch: int) -> Tensor | None:
    """bool [B, K]: which ensemble members were used for each sample; None if there is no ensemble.

    For a batch stacked for guidance, those of its first half.
    """
    for routing in prediction.routings:
        if routing.slot == ENSEMBLE:
            return routing.one_hot()[:batch].bool()
    return None


class Solver(ABC):
    """One step of an integrator, from noise to data.

    ``zeta`` is the noise of the reverse equation that it follows,

        dx = (-a x + (1 + zeta^2) / 2 g^2 score) ds + zeta g dW,

    with falling time s; 0 is the probability flow, None is neither.
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
        """State and time at which the step starts; by default x and t (churn adds noise first).

        ``t`` is 0-dimensional or f64 [B]; ``steps``: number of steps of the whole run, [B] if they
        differ.
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
        """The state at time ``u`` (sigma > 0), from ``estimate``, which holds x and t.

        ``u`` is 0-dimensional f64, or [B] if ``estimate.t`` is.
        """

    def land(
        self, query: Query, estimate: Estimate, state: SolverState, noise: SampleNoise | None
    ) -> Tensor:
        """The last step, to sigma = 0: the predicted x0."""
        return estimate.x0


class SolverConfig(Part):
    """Configuration of a solver."""

    def build(self) -> Solver:
        """The solver."""
        raise TypeError(f"{type(self).__name__} declares no build()")

    def evaluations_per_step(self) -> int | None:
        """Denoiser calls per step; None if they depend on the data."""
        return 1

    def evaluations(self, steps: int, to_clean: bool = True) -> int | None:
        """Denoiser calls of ``steps`` steps; the last one, to sigma = 0, takes one."""
        each = self.evaluations_per_step()
        if each is None:
            return None
        return (steps - 1) * each + 1 if to_clean else steps * each


def factor(value: Number, x: Tensor) -> Number:
    """A coefficient, float or f64 [B], shaped to multiply x [B, ...]."""
    return value if isinstance(value, float) else expand(value, x).to(x)


def mixture(
    process: Process, t: Tensor, of_x0: Tensor, of_eps: Tensor, view: str
) -> tuple[Tensor, Tensor]:
    """Coefficients of x and of a prediction in ``view`` at ``t`` whose sum is ``of_x0`` D +
    ``of_eps`` E."""
    x_of_x0, value_of_x0 = affine(process, t, view, "x0")
    x_of_eps, value_of_eps = affine(process, t, view, "eps")
    return of_x0 * x_of_x0 + of_eps * x_of_eps, of_x0 * value_of_x0 + of_eps * value_of_eps


def combined(*terms: tuple[Number, Tensor]) -> Tensor:
    """Sum of tensors [B, ...], each times its coefficient."""
    (weight, x), *rest = terms
    total = x if isinstance(weight, float) and weight == 1.0 else factor(weight, x) * x
    for weight, x in rest:
        if isinstance(weight, float):
            total = torch.add(total, x, alpha=weight)
        else:
            total = total + factor(weight, x) * x
    return total


def draw(noise: SampleNoise | None, x: Tensor) -> Tensor:
    """Standard normal noise of x's shape: float32 per sample, cast to x's dtype."""
    if noise is None:
        raise ConfigError(describe("noise", None, "a SampleNoise", "this solver is stochastic"))
    return noise.normal(x.shape[1:]).to(x)
