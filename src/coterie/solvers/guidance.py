"""Guidance: denoisers made of denoisers.

Classifier-free: Ho and Salimans 2022 (arXiv:2207.12598), D_u + w (D_c - D_u), w = 1 is none;
interval: Kynkaanniemi et al. 2024 (arXiv:2404.07724); rescale: Lin et al. 2023
(arXiv:2305.08891, eq. 15-16); autoguidance: Karras et al. 2024 (arXiv:2406.02507); classifier
guidance: Dhariwal and Nichol 2021 (arXiv:2105.05233).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.process import Process, as_view, convert, expand


class GuidanceConfig(Config):
    """How far to move from a weaker answer through the conditional one."""

    mode: Literal["cfg", "auto"] = "cfg"
    """cfg: the weaker answer is unconditional. auto: it is a weaker denoiser's."""
    weight: float = 1.0
    interval: tuple[float, float] | None = None
    """Guide only where lo <= noise level <= hi; None: everywhere."""
    interval_in: Literal["t", "sigma"] = "t"
    """What the interval counts: time t, or sigma / alpha."""
    rescale: float = Field(0.0, ge=0, le=1)
    """Share of rescaling to the conditional answer's standard deviation, per sample."""
    rescale_view: Literal["x0", "eps", "flow", "v"] = "x0"
    """Rescaling is not linear, so the view it is done in matters."""
    channels: int | None = Field(None, ge=1)
    """Guide the first channels only (DiT guides 3 of 4); None: all."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.interval is not None and not 0.0 <= self.interval[0] < self.interval[1]:
            raise ConfigError(describe("interval", self.interval, "[lo, hi] with 0 <= lo < hi"))
        return self


def guide(
    denoiser: DenoiserLike, config: GuidanceConfig, weak: DenoiserLike | None = None
) -> DenoiserLike:
    """A denoiser that answers with guidance.

    Conditional and null halves run as one stacked batch (conditional first); routings and
    auxiliary losses are those of the stacked batch. ``weak`` is for mode "auto". ConfigError if
    ``weak`` is missing, superfluous, or of another process.
    """
    if config.mode == "auto" and weak is None:
        raise ConfigError(describe("weak", None, "a weaker denoiser", 'mode "auto" needs one'))
    if config.mode == "cfg" and weak is not None:
        raise ConfigError(describe("mode", "cfg", '"auto" when a weak denoiser is given'))
    if weak is not None and weak.process != denoiser.process:
        hint = "wrap it in coterie.process.Transported"
        allowed = f"the process {denoiser.process}"
        raise ConfigError(describe("weak.process", str(weak.process), allowed, hint))
    return Guided(denoiser, config, weak)


class Guided:
    """See :func:`guide`."""

    def __init__(
        self, denoiser: DenoiserLike, config: GuidanceConfig, weak: DenoiserLike | None
    ) -> None:
        self.denoiser, self.config, self.weak = denoiser, config, weak
        self.process: Process = denoiser.process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        weight = self._weights(t)
        if not bool((weight != 1.0).any()):
            return self.denoiser(x, t, cond)
        prediction, weaker = self._pair(x, t, cond)
        strong = prediction.value
        guided = torch.lerp(weaker, strong, expand(weight, x).to(strong))
        guided = self._rescale(guided, strong, prediction.view, x, t, weight)
        if self.config.channels is not None:
            count = self.config.channels
            guided = torch.cat([guided[:, :count], strong[:, count:]], dim=1)
        return prediction.replace(value=guided)

    def _weights(self, t: Tensor) -> Tensor:
        """f64 [B]: the weight inside the interval, 1 outside."""
        level = t.double()
        if self.config.interval_in == "sigma":
            level = torch.exp(-self.process.lam(level))
        inside = torch.ones_like(level, dtype=torch.bool)
        if self.config.interval is not None:
            low, high = self.config.interval
            inside = (level >= low) & (level <= high)
        return torch.ones_like(level).masked_fill(inside, self.config.weight)

    def _pair(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Prediction, Tensor]:
        """The conditional prediction and the weaker value in the same view."""
        if self.weak is not None:
            strong = self.denoiser(x, t, cond)
            return strong, as_view(self.process, self.weak(x, t, cond), strong.view, x, t).value
        batch = x.shape[0]
        if not cond.tensors():
            raise ConfigError(describe("cond", "no fields", "a condition to guide towards"))
        both = Condition.cat(cond, cond.as_null(batch))
        stacked = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), both)
        variance = stacked.variance
        strong = stacked.replace(
            value=stacked.value[:batch],
            variance=None if variance is None else variance[:batch],
        )
        return strong, stacked.value[batch:]

    def _rescale(
        self, guided: Tensor, strong: Tensor, view: str, x: Tensor, t: Tensor, weight: Tensor
    ) -> Tensor:
        share = self.config.rescale
        if share == 0.0:
            return guided
        place = self.config.rescale_view
        inner = convert(self.process, guided, view, place, x, t)
        goal = convert(self.process, strong, view, place, x, t).flatten(1).std(1)
        now = inner.flatten(1).std(1).clamp_min(torch.finfo(x.dtype).tiny)
        factor = torch.where(weight != 1.0, share * goal / now + (1.0 - share), 1.0)
        scaled = expand(factor, x).to(x) * inner
        return convert(self.process, scaled, place, view, x, t)


class ClassifierGuided:
    """Score plus weight times the gradient of log p(y | x_t); answers in the eps view.

    ``log_prob(x, t, cond) -> [B]`` is differentiated with respect to x, row by row.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        log_prob: Callable[[Tensor, Tensor, Condition], Tensor],
        weight: float,
    ) -> None:
        if not abs(weight) < float("inf"):
            raise ConfigError(describe("weight", weight, "a finite number"))
        self.denoiser, self.log_prob, self.weight = denoiser, log_prob, weight
        self.process: Process = denoiser.process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        prediction = as_view(self.process, self.denoiser(x, t, cond), "eps", x, t)
        if self.weight == 0.0:
            return prediction
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.log_prob(at, t, cond).sum(), at)
        shift = expand(self.process.sigma(t), x) * self.weight * gradient
        return prediction.replace(value=prediction.value - shift.to(prediction.value))
