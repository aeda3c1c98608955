"""Conversion between the views of a prediction.

D = x0, E = eps, s = score, flow = alpha' D + sigma' E, v = alpha E - sigma D ("v-prediction").
Given x, all views are affine in D, so a convex combination of predictions may be made in any of
them. Each conversion divides by a quantity that is not 0 where the source view is trained: D from
x0, flow or v never divides by alpha alone; E from eps, score or v never by sigma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, unknown
from coterie.core.prediction import VIEWS
from coterie.process.base import Process, expand


def check_view(view: str, field: str = "view") -> None:
    """Raise ConfigError unless ``view`` is one of x0, eps, score, flow, v."""
    if view not in VIEWS:
        raise ConfigError(unknown(field, view, VIEWS))


def convert(
    process: Process, value: Tensor, source: str, target: str, x: Tensor, t: Tensor
) -> Tensor:
    """Convert ``value`` [B, ...] from the view ``source`` to the view ``target``.

    ``x`` [B, ...] is the state at ``t`` [B] (or 0-dimensional). Exact, differentiable in ``value``
    and ``x``; ConfigError for an unknown view.
    """
    check_view(source, "source")
    check_view(target, "target")
    if source == target:
        return value
    level = _Level(process, x, t)
    if target == "x0":
        return level.x0(value, source)
    if target == "eps":
        return level.eps(value, source)
    if target == "score":
        return -level.eps(value, source) / level.sigma
    if target == "v":
        return level.alpha * level.eps(value, source) - level.sigma * level.x0(value, source)
    return level.dalpha * level.x0(value, source) + level.dsigma * level.eps(value, source)


def affine(process: Process, t: Tensor, source: str, target: str) -> tuple[Tensor, Tensor]:
    """(a, b), shaped as ``t``: the ``target`` view is ``a x + b value``, ``value`` in the view
    ``source``."""
    none = torch.zeros_like(t)
    if source == target:
        return none, torch.ones_like(t)
    of_x = convert(process, none, source, target, torch.ones_like(t), t)
    return of_x, view_slope(process, t, source, target)


def view_slope(process: Process, t: Tensor, source: str, target: str) -> Tensor:
    """d ``target`` / d ``source`` at fixed x, [B]."""
    if source == target:
        return torch.ones_like(t)
    return convert(process, torch.ones_like(t), source, target, torch.zeros_like(t), t)


class _Level:
    """Coefficients at one noise level, shaped to multiply x."""

    def __init__(self, process: Process, x: Tensor, t: Tensor) -> None:
        self.process, self.x, self.t = process, x, t
        self.alpha, self.sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)

    @property
    def dalpha(self) -> Tensor:
        return expand(self.process.dalpha(self.t), self.x)

    @property
    def dsigma(self) -> Tensor:
        return expand(self.process.dsigma(self.t), self.x)

    def x0(self, value: Tensor, view: str) -> Tensor:
        if view == "x0":
            return value
        if view == "eps":
            return (self.x - self.sigma * value) / self.alpha
        if view == "score":
            return (self.x + self.sigma.square() * value) / self.alpha
        if view == "v":
            return (self.alpha * self.x - self.sigma * value) / self._power()
        return (self.dsigma * self.x - self.sigma * value) / self._wronskian()

    def eps(self, value: Tensor, view: str) -> Tensor:
        if view == "eps":
            return value
        if view == "x0":
            return (self.x - self.alpha * value) / self.sigma
        if view == "score":
            return -self.sigma * value
        if view == "v":
            return (self.sigma * self.x + self.alpha * value) / self._power()
        return (self.alpha * value - self.dalpha * self.x) / self._wronskian()

    def _power(self) -> Tensor:
        return self.alpha.square() + self.sigma.square()

    def _wronskian(self) -> Tensor:
        return self.alpha * self.dsigma - self.sigma * self.dalpha


def target_of(process: Process, x0: Tensor, eps: Tensor, view: str, t: Tensor) -> Tensor:
    """The training target of a network with this ``view``, for the pair (x0, eps) at ``t``.

    Never divides by alpha; only the score divides by sigma.
    """
    check_view(view)
    if view == "x0":
        return x0
    if view == "eps":
        return eps
    if view == "score":
        return -eps / expand(process.sigma(t), x0)
    if view == "v":
        return expand(process.alpha(t), x0) * eps - expand(process.sigma(t), x0) * x0
    return expand(process.dalpha(t), x0) * x0 + expand(process.dsigma(t), x0) * eps


def error_scale(process: Process, t: Tensor, view: str) -> Tensor:
    """|d view / d D|^2 at fixed x, f64 [B]: squared error in ``view`` = this times |D - x0|^2.

    alpha and sigma are floored at 1e-6, so ratios of two scales are finite at both ends.
    """
    check_view(view)
    t = t.double()
    alpha, sigma = floored(process, t)
    if view == "x0":
        return torch.ones_like(alpha)
    if view == "eps":
        return (alpha / sigma).square()
    if view == "score":
        return (alpha / sigma.square()).square()
    if view == "v":
        return ((alpha.square() + sigma.square()) / sigma).square()
    # Nothing to floor in alpha here: the flow's slope does not vanish with it.
    return (process.dalpha(t) - process.dsigma(t) * process.alpha(t) / sigma).square()


def floored(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at f64 ``t``, at least 1e-6 each, for ratios used as loss weights."""
    t = t.double()
    return process.alpha(t).clamp_min(1e-6), process.sigma(t).clamp_min(1e-6)


def as_view(process: Process, prediction: Any, view: str, x: Tensor, t: Tensor) -> Any:
    """``prediction`` in another view; routings and auxiliary losses are kept."""
    if prediction.view == view:
        return prediction
    value = convert(process, prediction.value, prediction.view, view, x, t)
    return prediction.replace(value=value, view=view)
