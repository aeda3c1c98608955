"""Rates of log weights per unit of lam = log(alpha / sigma), which are finite in every process.

Legend: B batch, M experts, d numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.process import Process, expand

Reward = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x [B, ...], t [B], cond) -> [B], differentiable in x, row by row; x is the noisy state."""


Power = float | Tensor
"""The power of one density: the same for all rows, or f [B] where it depends on the noise level."""


@dataclass(frozen=True, eq=False)
class Differences:
    """How experts differ from the first of them, in one view that they share.

    ``gap`` [B, ...]: sum beta_i (a_i - a_0), None where there is one expert. A view is affine in
    eps given x, so differences in it are those of eps up to a factor: no expert but the first is
    converted, and what agrees cancels exactly. ``length`` f64 [B] is |gap|^2, and ``spread`` sum
    beta_i |a_i - a_0|^2.
    """

    gap: Tensor | None
    length: Tensor
    spread: Tensor

    @staticmethod
    def of(values: Sequence[Tensor], betas: Sequence[Power], weighted: bool) -> Differences:
        """``values`` M times [B, ...], ``betas`` M; unless ``weighted`` lengths are left at 0."""
        first = values[0]
        gap: Tensor | None = None
        spread = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        for beta, value in zip(betas[1:], values[1:], strict=True):
            difference = value - first
            part = scaled(beta, difference)
            gap = part if gap is None else gap + part
            if weighted:
                spread = spread + beta * square(difference)
        length = square(gap) if weighted and gap is not None else torch.zeros_like(spread)
        return Differences(gap, length, spread)


def score_rate(
    found: Differences, slope: Tensor, total: Power, summed: Tensor, drift: Tensor | None
) -> Tensor:
    """f64 [B]: |sum beta eps|^2 - sum beta |eps|^2 + (total - 1) d drift, where the betas add up to
    ``total``. ``slope`` f64 [B]: of eps in the view of ``found``; ``summed`` [B, ...]: sum beta
    eps; ``drift`` [B] as of :func:`drift_per_lam`, None where ``total`` is 1.
    """
    scale = slope.square()
    rate = scale * (found.length - found.spread)
    if drift is None:
        return rate
    # total |eps_0|^2 + 2 eps_0 . gap, from lengths alone.
    own = (square(summed) - scale * found.length) / total
    return rate + (total - 1.0) * (own + summed[0].numel() * drift.double())


def square(value: Tensor) -> Tensor:
    """f64 [B]: |value|^2 of each row."""
    return torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=torch.float64).square()


def scaled(power: Power, value: Tensor) -> Tensor:
    """Each row of ``value`` [B, ...] times its power, in the type of ``value``."""
    return power * value if isinstance(power, float) else expand(power, value).to(value) * value


def reward_and_gradient(
    reward: Reward, x: Tensor, t: Tensor, cond: Condition
) -> tuple[Tensor, Tensor]:
    """r [B] and its gradient in x, [B, ...]."""
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        value = reward(at, t, cond)
        if value.shape != x.shape[:1]:
            raise DataError(describe("reward", tuple(value.shape), f"[B] with B = {len(x)}"))
        (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient.to(x)


def signal_share(process: Process, t: Tensor) -> Tensor:
    """alpha^2 / (alpha^2 + sigma^2): 0 in pure noise, 1 in clean data, equal where lam is."""
    signal, noise = process.alpha(t).square(), process.sigma(t).square()
    return signal / (signal + noise)


def signal_slope(process: Process, t: Tensor) -> Tensor:
    """d signal_share / d lam."""
    share = signal_share(process, t)
    return 2.0 * share * (1.0 - share)


def drift_per_lam(process: Process, t: Tensor) -> Tensor:
    """The forward drift a(t) per unit of falling lam: from -1 (pure noise) to 0."""
    shrink = process.dalpha(t) * process.sigma(t)
    return -shrink / (shrink - process.alpha(t) * process.dsigma(t))
