"""Data distributions whose optimal denoiser is known in closed form, under every process.

They test solvers, guidance and ensembles without training. Components are isotropic Gaussians
N(mean_k, std_k^2 I). K components, B samples; data of any shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction, View
from coterie.process.base import Process, expand
from coterie.process.views import check_view, convert


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights_k N(means_k, stds_k^2 I); means [K, ...], weights [K], stds [K]."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        count = self.means.shape[0]
        for name in ("stds", "weights"):
            value = getattr(self, name)
            if value.shape != (count,) or not bool((value >= 0).all()):
                raise ConfigError(describe(name, value.tolist(), f"{count} numbers >= 0"))

    @classmethod
    def gaussian(cls, mean: Tensor, std: float) -> Mixture:
        """A single Gaussian N(mean, std^2 I); mean has the shape of one sample."""
        one = torch.ones(1, dtype=mean.dtype)
        return cls(mean[None], std * one, one)

    def component(self, index: int) -> Mixture:
        """The k-th component alone."""
        rows = slice(index, index + 1)
        return Mixture(self.means[rows], self.stds[rows], torch.ones_like(self.weights[rows]))

    def sample(self, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """(x0 [count, ...], component i64 [count])."""
        label = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        noise = torch.randn(count, *self.means.shape[1:], generator=rng, dtype=self.means.dtype)
        return self.means[label] + expand(self.stds[label], noise) * noise, label

    def variances(self, process: Process, t: Tensor) -> Tensor:
        """[B, K]: alpha^2 std_k^2 + sigma^2, the variance of component k's marginal at t [B]."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha[:, None] * self.stds.to(alpha)).square() + sigma[:, None].square()

    def log_joint(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """[B, K]: log(weight_k N(x; alpha mean_k, variance_k)) of x [B, ...] at t [B]."""
        variance = self.variances(process, t)
        centres = expand(process.alpha(t), x)[:, None] * self.means.to(x)
        squared = (x[:, None] - centres).flatten(2).square().sum(2)
        dims = x[0].numel()
        log_normal = -0.5 * (squared / variance + dims * (2.0 * math.pi * variance).log())
        return self.weights.to(x).log() + log_normal

    def log_prob(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """[B]: log density of the marginal at t."""
        return torch.logsumexp(self.log_joint(process, x, t), dim=1)

    def responsibilities(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """[B, K]: posterior probability of each component given x at t."""
        return torch.softmax(self.log_joint(process, x, t), dim=1)

    def component_denoised(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """[B, K, ...]: E[x0 | x, component k] = m + alpha s^2 / variance (x - alpha m)."""
        alpha = process.alpha(t)
        gain = alpha[:, None] * self.stds.to(alpha).square() / self.variances(process, t)
        means = self.means.to(x)
        residual = x[:, None] - expand(alpha, x)[:, None] * means
        return means + gain.reshape(*gain.shape, *[1] * (x.dim() - 1)) * residual

    def denoise(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """[B, ...]: E[x0 | x] at t [B], the optimal denoiser."""
        share = self.responsibilities(process, x, t)
        parts = self.component_denoised(process, x, t)
        return (share.reshape(*share.shape, *[1] * (x.dim() - 1)) * parts).sum(1)

    def flow_map(self, process: Process, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Exact solution at u [B] of the probability flow ODE from x at t [B]; one component."""
        if self.means.shape[0] != 1:
            raise ConfigError(describe("components", self.means.shape[0], "1 for a flow map"))
        mean = self.means[0].to(x)
        ratio = (self.variances(process, u) / self.variances(process, t)).sqrt()[:, 0]
        centred = x - expand(process.alpha(t), x) * mean
        return expand(process.alpha(u), x) * mean + expand(ratio, x) * centred


class ExactDenoiser:
    """The optimal denoiser of a mixture, in any view, usable like a trained network.

    A label in the condition selects that component; NULL_LABEL (or no label) is the mixture.
    """

    def __init__(self, process: Process, mixture: Mixture, view: View = "x0") -> None:
        check_view(view)
        self.process = process
        self.mixture = mixture
        self.view: View = view

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        denoised = self.mixture.denoise(self.process, x, t)
        if cond.label is not None:
            parts = self.mixture.component_denoised(self.process, x, t)
            rows = torch.arange(x.shape[0], device=x.device)
            chosen = parts[rows, cond.label.clamp_min(0)]
            denoised = torch.where(expand(cond.label >= 0, x), chosen, denoised)
        value = convert(self.process, denoised, "x0", self.view, x, t)
        return Prediction(value, self.view)

    def log_prob(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """[B]: log density of the marginal at t, of the component that the label selects."""
        joint = self.mixture.log_joint(self.process, x, t)
        whole = torch.logsumexp(joint, dim=1)
        if cond.label is None:
            return whole
        label = cond.label.clamp_min(0)
        chosen = joint.gather(1, label[:, None])[:, 0] - self.mixture.weights.to(x).log()[label]
        return torch.where(cond.label >= 0, chosen, whole)
