"""Mean, variance and normaliser of weighted particles without a particle.

Gaussian experts in one dimension keep the weighted law Gaussian: with drift A x + a and weight
rate B2 x^2 + B1 x + B0 per unit of lam, and noise N,

    dV = (2 A V + N + 2 B2 V^2) dlam,  dmu = (A mu + a + V (2 B2 mu + B1)) dlam,
    dlogZ = (B2 (V + mu^2) + B1 mu + B0) dlam.

The coefficients are read off a composition by asking it about three states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coterie.core.prediction import Condition
from coterie.ensembles.product import Composition
from coterie.ensembles.product_rates import drift_per_lam, signal_share
from coterie.process import PROCESSES, ExactDenoiser, Mixture, Process, as_view

F64 = torch.float64


class Moments(NamedTuple):
    mean: float
    variance: float
    log_z: float


def process(kind: str = "vp_linear", **settings: Any) -> Process:
    made: Process = PROCESSES.parse({"kind": kind, **settings}).build()
    return made


def gaussian(kind: Process, mean: float, std: float, view: Any = "x0") -> ExactDenoiser:
    return ExactDenoiser(kind, Mixture.gaussian(torch.tensor([mean], dtype=F64), std), view)


def exact(made: Composition, experts: list[tuple[float, float]], t: Tensor, tilt: Any = None):
    """Moments of prod N(alpha m, alpha^2 s^2 + sigma^2)^beta exp(b r) at t [1]; ``tilt`` is
    (centre, width) of r = -(x - centre)^2 / (2 width^2)."""
    alpha, sigma = float(made.process.alpha(t)), float(made.process.sigma(t))
    share = float(signal_share(made.process, t))
    betas = [
        noisy + (beta - noisy) * share
        for beta, noisy in zip(made.betas, made.noisy_betas, strict=True)
    ]
    quadratic = linear = constant = 0.0  # log density = -quadratic x^2 / 2 + linear x + constant
    for beta, (mean, std) in zip(betas, experts, strict=True):
        variance = (alpha * std) ** 2 + sigma**2
        quadratic += beta / variance
        linear += beta * alpha * mean / variance
        constant -= 0.5 * beta * ((alpha * mean) ** 2 / variance + math.log(2 * math.pi * variance))
    if tilt is not None:
        strength = made.config.tilt * share / tilt[1] ** 2
        quadratic += strength
        linear += strength * tilt[0]
        constant -= 0.5 * strength * tilt[0] ** 2
    log_z = constant + 0.5 * linear**2 / quadratic + 0.5 * math.log(2 * math.pi / quadratic)
    return Moments(linear / quadratic, 1.0 / quadratic, log_z)


def coefficients(made: Composition, times: Tensor, zeta: float) -> list[list[float]]:
    """A, a, N, B2, B1, B0 per unit of lam, for each of times [T]."""
    count = len(times)
    x = torch.tensor([[0.0], [1.0], [-1.0]], dtype=F64).repeat_interleave(count, 0)
    rows = times.repeat(3)
    answer = as_view(made.process, made(x, rows, Condition()), "score", x, rows)
    assert answer.weight_rate is not None
    zero, plus, minus = answer.weight_rate.reshape(3, count)
    s0, s1, _ = answer.value[:, 0].reshape(3, count)
    sigma2 = made.process.sigma(times).square()
    push = (1.0 + zeta**2) * sigma2
    columns = [
        -drift_per_lam(made.process, times) + push * (s1 - s0),
        push * s0,
        2.0 * zeta**2 * sigma2,
        0.5 * (plus + minus) - zero,
        0.5 * (plus - minus),
        zero,
    ]
    return torch.stack(columns, 1).tolist()


def flow(
    made: Composition, start: Moments, t_end: float, zeta: float = 1.0, weighted: bool = True
) -> Moments:
    """Moments at ``t_end`` of particles that start with ``start`` at ``t_max``; RK4 in lam."""
    kind, steps = made.process, 1000
    ends = kind.lam(torch.tensor([kind.t_max, t_end], dtype=F64))
    lams = torch.linspace(float(ends[0]), float(ends[1]), 2 * steps + 1, dtype=F64)
    times = kind.time_of_lam(lams).clamp(max=kind.t_max)
    table = coefficients(made, times, zeta)
    h = float(lams[2] - lams[0])
    state = list(start)

    def slope(at: list[float], index: int) -> list[float]:
        mean, variance, _ = at
        drift, offset, noise, b2, b1, b0 = table[index]
        if not weighted:
            b2 = b1 = b0 = 0.0
        return [
            drift * mean + offset + variance * (2.0 * b2 * mean + b1),
            2.0 * drift * variance + noise + 2.0 * b2 * variance**2,
            b2 * (variance + mean**2) + b1 * mean + b0,
        ]

    for step in range(steps):
        state = _rk4(slope, state, 2 * step, h)
    return Moments(*state)


def _rk4(
    slope: Callable[[list[float], int], list[float]], state: list[float], index: int, h: float
) -> list[float]:
    def moved(by: list[float], share: float) -> list[float]:
        return [value + share * h * change for value, change in zip(state, by, strict=True)]

    k1 = slope(state, index)
    k2 = slope(moved(k1, 0.5), index + 1)
    k3 = slope(moved(k2, 0.5), index + 1)
    k4 = slope(moved(k3, 1.0), index + 2)
    total = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)]
    return moved(total, 1.0)
