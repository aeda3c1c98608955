"""The formula of classifier-free guidance and its variants.

    D = D_base + (w - 1) (D_strong - D_weak),

with base = strong by default: D_weak + w (D_strong - D_weak). The weak prediction is that without
condition (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598), that of a worse
denoiser (autoguidance, Karras et al. 2024, arXiv:2406.02507), or that of the same network with
other experts. The formula is linear, so it is the same in every view, except with ``rescale`` (Lin
et al. 2023, arXiv:2305.08891, eq. 15-16). Interval: Kynkaanniemi et al. 2024 (arXiv:2404.07724).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.process.base import Process, expand
from coterie.process.views import as_view, convert

MOST = 1e4
"""No answer of float32 is left in a difference that counts more often than this."""


class ContrastConfig(Config):
    """Weight of guidance, the noise levels at which it acts, and rescaling."""

    weight: float = Field(1.0, ge=-MOST, le=MOST)
    """factor w of the difference of predictions; 1: no guidance"""
    interval: tuple[float, float] | None = None
    """Noise levels (lo, hi) at which guidance acts; elsewhere w = 1. None: everywhere."""
    interval_in: Literal["t", "sigma"] = "t"
    """Unit of ``interval``: time t, or sigma / alpha."""
    rescale: float = Field(0.0, ge=0, le=1)
    """Share of rescaling to the standard deviation of the strong prediction, per sample; 0:
    none."""
    rescale_view: Literal["x0", "eps", "flow", "v"] = "x0"
    """View in which to rescale; the result depends on it."""
    channels: int | None = Field(None, ge=1)
    """Guide the first channels only (DiT guides 3 of 4); None: all."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.interval is not None and not 0.0 <= self.interval[0] < self.interval[1]:
            raise ConfigError(describe("interval", self.interval, "[lo, hi] with 0 <= lo < hi"))
        return self

    def weighed(self, guidance: float | None) -> Self:
        """A copy with the weight ``guidance``; unchanged for None."""
        if guidance is None:
            return self
        if not abs(guidance) <= MOST:
            raise ConfigError(describe("guidance", guidance, f"{-MOST:g}..{MOST:g}"))
        return self.replace(weight=guidance)

    @property
    def plain(self) -> bool:
        """Whether the weight is the same at every noise level and channel, without rescaling."""
        return self.interval is None and not self.rescale and self.channels is None

    def weights(self, process: Process, t: Tensor, own: Tensor | None = None) -> Tensor:
        """f64 [B]: the weight inside the interval, 1 outside. ``own`` [B]: weights of the samples
        that replace ``weight``."""
        level = t.double()
        if self.interval_in == "sigma":
            level = torch.exp(-process.lam(level))
        inside = torch.ones_like(level, dtype=torch.bool)
        if self.interval is not None:
            low, high = self.interval
            inside = (level >= low) & (level <= high)
        weight = level.new_tensor(self.weight) if own is None else own.to(level)
        return torch.where(inside, weight, torch.ones_like(level))


def contrast(
    process: Process,
    config: ContrastConfig,
    x: Tensor,
    t: Tensor,
    strong: Prediction,
    weak: Prediction,
    base: Prediction | None = None,
    own: Tensor | None = None,
) -> Prediction:
    """The guided prediction at x [B, ...] and t [B]: ``base`` (None: ``strong``) plus the
    difference.

    ``own``: weights of the samples, see :meth:`ContrastConfig.weights`. The result is in the view
    of ``base`` and has its routings.
    """
    base = strong if base is None else base
    upper = as_view(process, strong, base.view, x, t).value
    lower = as_view(process, weak, base.view, x, t).value
    if base is strong and config.plain and own is None:
        return base.replace(value=torch.lerp(lower, upper, config.weight))
    weight = config.weights(process, t, own)
    factor = expand(weight, x).to(upper)
    if base is strong:
        moved = torch.lerp(lower, upper, factor)
    else:
        moved = base.value + (factor - 1.0) * (upper - lower)
    if config.rescale:
        moved = _rescale(process, config, moved, base, x, t, weight)
    if config.channels is not None:
        moved = torch.cat([moved[:, : config.channels], base.value[:, config.channels :]], dim=1)
    return base.replace(value=moved)


def _rescale(
    process: Process,
    config: ContrastConfig,
    moved: Tensor,
    base: Prediction,
    x: Tensor,
    t: Tensor,
    weight: Tensor,
) -> Tensor:
    view, place, share = base.view, config.rescale_view, config.rescale
    inner = convert(process, moved, view, place, x, t)
    goal = convert(process, base.value, view, place, x, t).flatten(1).std(1)
    now = inner.flatten(1).std(1).clamp_min(torch.finfo(x.dtype).tiny)
    factor = torch.where(weight != 1.0, share * goal / now + (1.0 - share), 1.0)
    scaled = expand(factor, x).to(x) * inner
    return convert(process, scaled, place, view, x, t)


def with_and_without(
    denoiser: DenoiserLike, x: Tensor, t: Tensor, cond: Condition
) -> tuple[Prediction, Prediction]:
    """The predictions with the condition and with its null form, from one stacked batch.

    Conditional samples come first. Both predictions carry the routings and auxiliary losses of the
    whole batch. An ensemble that chooses members uses the choice of the conditional half for both,
    if it has a method ``paired(x, t, cond, null) -> Prediction`` of the stacked batch.
    """
    batch = x.shape[0]
    if not cond.tensors():
        raise ConfigError(describe("cond", "no fields", "a condition to guide towards"))
    paired = getattr(denoiser, "paired", None)
    if paired is not None:
        stacked: Prediction = paired(x, t, cond, cond.as_null(batch))
    else:
        stacked = denoiser(torch.cat([x, x]), torch.cat([t, t]), cond.with_null)
    return _rows(stacked, slice(0, batch)), _rows(stacked, slice(batch, None))


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    variance = prediction.variance
    return prediction.replace(
        value=prediction.value[rows], variance=None if variance is None else variance[rows]
    )
