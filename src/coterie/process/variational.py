"""The variational view: transitions, learned variances and the terms of the bound.

Between times u < t: q(x_t | x_u) has scale alpha_t/alpha_u and variance
var_forward = sigma_t^2 - (alpha_t/alpha_u)^2 sigma_u^2 (DDPM's beta); the posterior
q(x_u | x_t, x0) has variance var_forward sigma_u^2 / sigma_t^2 (beta-tilde). A learned variance in
[-1, 1] interpolates their logarithms: -1 = posterior, +1 = forward (Nichol and Dhariwal 2021,
arXiv:2102.09672, eq. 15). Valid for any (alpha, sigma), hence for respaced grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.process.base import Process, expand


@dataclass(frozen=True)
class Transition:
    """One reverse step t -> u: mean of the posterior = x_coef x + d_coef D."""

    x_coef: Tensor
    d_coef: Tensor
    var_posterior: Tensor
    var_forward: Tensor


def transition(process: Process, t: Tensor, u: Tensor) -> Transition:
    """Gaussian posterior q(x_u | x_t, x0); fields have the shape of ``t``."""
    alpha_t, alpha_u = process.alpha(t), process.alpha(u)
    var_t, var_u = process.sigma(t).square(), process.sigma(u).square()
    ratio = alpha_t / alpha_u
    # sigma_t^2 (1 - SNR_t/SNR_u): the plain difference loses digits on fine grids.
    forward = var_t * -torch.expm1(2.0 * (process.lam(t) - process.lam(u)))
    return Transition(
        x_coef=ratio * var_u / var_t,
        d_coef=alpha_u * forward / var_t,
        var_posterior=forward * var_u / var_t,
        var_forward=forward,
    )


def learned_log_variance(variance: Tensor, var_posterior: Tensor, var_forward: Tensor) -> Tensor:
    """Log variance of p(x_u | x_t) from a network's ``variance`` in [-1, 1] (not clamped)."""
    share = 0.5 * (variance + 1.0)
    low, high = expand(var_posterior.log(), variance), expand(var_forward.log(), variance)
    return share * high + (1.0 - share) * low


def vlb_bits(
    process: Process, x0: Tensor, x: Tensor, t: Tensor, denoised: Tensor, variance: Tensor
) -> Tensor:
    """One term of the bound per sample, in bits per dimension, [B].

    x0, x, denoised (D) and variance [B, ...]; t [B] on the grid of a discrete process. Index i > 0:
    KL(q(x_{i-1} | x_i, x0) || p); index 0: negative log-likelihood of x0, 8-bit data scaled to
    [-1, 1]. The variance at index 0 uses the posterior variance of index 1, as that of index 0 is
    zero. Detach ``denoised`` to train the variance alone. A hybrid loss adds this times
    num_steps / 1000 to the simple loss. ConfigError if the process is continuous.
    """
    if not process.discrete:
        raise ConfigError(describe("process", type(process).__name__, "a discrete process (ddpm)"))
    index = process.step_index(t)
    at = process.time_of_index(index, torch.float64)
    step = transition(process, at, process.time_of_index(index - 1, torch.float64))
    later = index.clamp_min(1)
    floor = transition(
        process,
        process.time_of_index(later, torch.float64),
        process.time_of_index(later - 1, torch.float64),
    ).var_posterior
    log_var = learned_log_variance(variance, floor.to(x), step.var_forward.to(x))
    mean = expand(step.x_coef.to(x), x) * x + expand(step.d_coef.to(x), x) * denoised
    true_mean = expand(step.x_coef.to(x), x) * x + expand(step.d_coef.to(x), x) * x0
    divergence = gaussian_kl(true_mean, expand(floor.log().to(x), x), mean, log_var)
    likelihood = -discretized_log_likelihood(x0, mean, 0.5 * log_var)
    nats = torch.where(expand(index == 0, x), likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2.0)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (
        log_var2
        - log_var1
        - 1.0
        + torch.exp(log_var1 - log_var2)
        + (mean1 - mean2).square() * torch.exp(-log_var2)
    )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass N(mean, exp(2 log_scale)) puts on the bin of 8-bit data ``x`` in [-1, 1].

    Bins are 2/255 wide; the outermost two reach to infinity. Nats, elementwise, at least log 1e-12.
    """
    inverse = torch.exp(-log_scale)
    upper = torch.special.ndtr((x - mean + 1.0 / 255.0) * inverse)
    lower = torch.special.ndtr((x - mean - 1.0 / 255.0) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()


def elbo_weights(process: Process, times: Tensor) -> Tensor:
    """f64 [N]: weights of E|D - x0|^2 in the bound of the chain ``times`` [N+1], noise to clean.

    Entry n belongs to the prediction D at times[n] for the step to times[n+1]: (SNR_{n+1} -
    SNR_n)/2, in nats. ConfigError unless the SNR rises strictly along ``times``.
    """
    lam = process.lam(times.double())
    if not bool((lam.diff() > 0).all()):
        raise ConfigError(describe("times", tuple(times.tolist()), "times from noise to clean"))
    snr = torch.exp(2.0 * lam)
    return 0.5 * snr.diff()
