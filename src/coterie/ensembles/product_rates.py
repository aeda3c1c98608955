"""Rates of log weights per unit of lam = log(alpha / sigma), which are finite in every process.

Legend: B batch, M experts, d numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.process import Process

Reward = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x [B, ...], t [B], cond) -> [B], differentiable in x, row by row; x is the noisy state."""


def score_rate(eps: Sequence[Tensor], betas: Tensor, drift: Tensor | None) -> Tensor:
    """f64 [B]: |sum beta eps|^2 - sum beta |eps|^2 + (sum beta - 1) d drift, with eps M times
    [B, ...] and betas [B, M]; ``drift`` [B] as of :func:`drift_per_lam`, None where sum beta = 1.

    Written with differences to the first expert, so that what agrees cancels exactly.
    """
    first = eps[0].flatten(1).double()
    betas = betas.double()
    gap = torch.zeros_like(first)
    spread = first.new_zeros(len(first))
    for index, one in enumerate(eps[1:], start=1):
        difference = one.flatten(1).double() - first
        gap = gap + betas[:, index, None] * difference
        spread = spread + betas[:, index] * difference.square().sum(1)
    rate = gap.square().sum(1) - spread
    if drift is None:
        return rate
    total = betas.sum(1)
    own = total * first.square().sum(1) + 2.0 * (first * gap).sum(1)
    return rate + (total - 1.0) * (own + drift.double() * first.shape[1])


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
