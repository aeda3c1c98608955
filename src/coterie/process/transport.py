"""Using a denoiser under another process than it was trained with.

Two processes at the same lam = log(alpha / sigma) differ by a scaling of x and a change of time:
x_A / alpha_A = x_B / alpha_B where lam_A(t_A) = lam_B(t_B). Ensembles mix experts trained with
different schedules by this rule.
"""

from __future__ import annotations

from torch import Tensor

from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.process.base import Process, expand
from coterie.process.views import as_view


def transport(source: Process, target: Process, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """State ``x`` [B, ...] of ``source`` at ``t`` [B] -> (x, t) of the same lam in ``target``.

    Noise levels outside the target's usable range are moved to its nearest end. The scale is the
    ratio of sqrt(alpha^2 + sigma^2): alpha_B / alpha_A at equal lam, and finite at alpha = 0.
    """
    low, high = target.lam(t.new_tensor([target.t_max, target.t_min])).unbind()
    lam = source.lam(t)
    # Pure noise, lam = -inf, has no time in every process.
    moved = target.time_of_lam(lam.clamp(low, high)).clamp(target.t_min, target.t_max)
    moved = moved.masked_fill(lam <= low, target.t_max).masked_fill(lam >= high, target.t_min)
    scale = _norm(target, moved) / _norm(source, t)
    return expand(scale, x) * x, moved


def _norm(process: Process, t: Tensor) -> Tensor:
    return (process.alpha(t).square() + process.sigma(t).square()).sqrt()


class Transported:
    """A denoiser of another process, usable under ``process``; it predicts x0."""

    def __init__(self, denoiser: DenoiserLike, process: Process) -> None:
        self.denoiser = denoiser
        self.process = process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        inner_x, inner_t = transport(self.process, self.denoiser.process, x, t)
        prediction = self.denoiser(inner_x, inner_t, cond)
        return as_view(self.denoiser.process, prediction, "x0", inner_x, inner_t)
