"""Guidance: denoisers that combine a conditional and a weaker prediction.

Classifier-free guidance and autoguidance use one formula, :mod:`coterie.process.contrast`; weight 1
is no guidance. Classifier guidance: Dhariwal and Nichol 2021 (arXiv:2105.05233).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.process import (
    ContrastConfig,
    Process,
    contrast,
    convert,
    expand,
    with_and_without,
)
from coterie.solvers.base import prepared


class GuidanceConfig(ContrastConfig):
    """Guidance of a sampling run."""

    mode: Literal["cfg", "auto"] = "cfg"
    """The weaker prediction is the unconditional one (``cfg``), or a weaker denoiser's
    (``auto``)."""


def guide(
    denoiser: DenoiserLike, config: GuidanceConfig, weak: DenoiserLike | None = None
) -> DenoiserLike:
    """A denoiser that predicts with guidance.

    Conditional and null halves run as one stacked batch (conditional first); routings and auxiliary
    losses are those of the stacked batch. ``weak``: the weaker denoiser, for mode "auto".
    ConfigError if ``weak`` is missing, superfluous, or of another process.
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
        if self._idle(t, cond.guidance):
            return self.denoiser(x, t, cond)
        if self.weak is None:
            strong, weak = with_and_without(self.denoiser, x, t, cond)
        else:
            strong, weak = self.denoiser(x, t, cond), self.weak(x, t, cond)
        return contrast(self.process, self.config, x, t, strong, weak, own=cond.guidance)

    def prepare(self, cond: Condition) -> Condition:
        """See :func:`coterie.solvers.base.prepared`: prepares the condition and its null form."""
        made = prepared(self.denoiser, cond)
        if made is cond or self.weak is not None:
            return made
        null = cond.as_null(len(next(iter(cond.tensors().values()))))
        return made.replace(unconditional=prepared(self.denoiser, null))

    def _idle(self, t: Tensor, own: Tensor | None) -> bool:
        """Whether no sample is guided at its time."""
        if own is None and self.config.interval is None:
            return self.config.weight == 1.0
        return not bool((self.config.weights(self.process, t, own) != 1.0).any())


class ClassifierGuided:
    """Score plus ``weight`` times the gradient of log p(y | x_t), in the view of ``denoiser``.

    ``log_prob(x, t, cond) -> [B]`` is differentiated with respect to x, row by row; ``denoiser`` is
    not differentiated. In eps the gradient counts -weight sigma. Weight 0: no guidance.
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
        prediction = self.denoiser(x, t, cond)
        if self.weight == 0.0:
            return prediction
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.log_prob(at, t, cond).sum(), at)
        noise = -self.weight * expand(self.process.sigma(t), x) * gradient
        # Views are affine in the noise: what moves them is the view of the move at x = 0.
        shift = convert(self.process, noise, "eps", prediction.view, torch.zeros_like(x), t)
        return prediction.replace(value=prediction.value + shift.to(prediction.value))
