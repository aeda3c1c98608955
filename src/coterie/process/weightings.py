"""Weights of the loss by noise level. A weighting is stated for |D - x0|^2 and converted to any
view.

``weighting(t, view)`` multiplies the per-sample mean squared error made in ``view``;
``weighting.combine(per_sample, t, view)`` is the scalar to minimise. Only the product w(t) p(t)
with the density of training times matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from coterie.core.registry import Part, Registry
from coterie.process.base import Process
from coterie.process.views import check_view, error_scale, floored

WEIGHTINGS = Registry("weighting", "coterie.weightings")


class Weighting(Protocol):
    """Weights of per-sample losses. Learned ones are ``nn.Module`` with a learning rate ``lr``."""

    def __call__(self, t: Tensor, view: str) -> Tensor:
        """f32 [B]: factor of the squared error made in ``view``."""
        ...

    def combine(self, per_sample: Tensor, t: Tensor, view: str) -> Tensor:
        """Scalar loss from [B] losses at times [B]."""
        ...


@dataclass(frozen=True)
class DataWeighting:
    """Fixed weight, given as the factor of |D - x0|^2 by ``rule(process, t f64) -> f64 [B]``."""

    process: Process
    rule: Callable[[Process, Tensor], Tensor]

    def __call__(self, t: Tensor, view: str) -> Tensor:
        weight = self.rule(self.process, t.double()) / error_scale(self.process, t, view)
        return weight.float()

    def combine(self, per_sample: Tensor, t: Tensor, view: str) -> Tensor:
        return (self(t, view).to(per_sample.dtype) * per_sample).mean()


@dataclass(frozen=True)
class _Constant:
    def __call__(self, t: Tensor, view: str) -> Tensor:
        check_view(view)
        return torch.ones_like(t, dtype=torch.float32)

    def combine(self, per_sample: Tensor, t: Tensor, view: str) -> Tensor:
        check_view(view)
        return per_sample.mean()


@WEIGHTINGS.register
class ConstantWeighting(Part):
    """1 in the view that the network predicts (the "simple" loss)."""

    kind: Literal["constant"] = "constant"

    def build(self, process: Process) -> Weighting:
        return _Constant()


def _snr(process: Process, t: Tensor) -> Tensor:
    alpha, sigma = floored(process, t)
    return (alpha / sigma).square()


@WEIGHTINGS.register
class SNRWeighting(Part):
    """SNR |D - x0|^2: the unweighted noise-prediction loss, in any view."""

    kind: Literal["snr"] = "snr"

    def build(self, process: Process) -> Weighting:
        return DataWeighting(process, _snr)


@WEIGHTINGS.register
class MinSNRWeighting(Part):
    """min(SNR, gamma) |D - x0|^2 (Hang et al. 2023, arXiv:2303.09556)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(5.0, gt=0)  # upper limit of the signal-to-noise ratio

    def build(self, process: Process) -> Weighting:
        return DataWeighting(process, lambda p, t: _snr(p, t).clamp(max=self.gamma))


@WEIGHTINGS.register
class EDMWeighting(Part):
    """(s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma / alpha (arXiv:2206.00364)."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0)  # standard deviation of the data

    def build(self, process: Process) -> Weighting:
        return DataWeighting(process, lambda p, t: _snr(p, t) + self.sigma_data**-2)


@WEIGHTINGS.register
class P2Weighting(Part):
    """Noise-prediction loss divided by (k + SNR)^gamma (Choi et al. 2022, arXiv:2204.00227)."""

    kind: Literal["p2"] = "p2"
    k: float = Field(1.0, gt=0)  # added to the signal-to-noise ratio
    gamma: float = Field(1.0, ge=0)  # exponent

    def build(self, process: Process) -> Weighting:
        return DataWeighting(process, lambda p, t: _snr(p, t) / (self.k + _snr(p, t)) ** self.gamma)


def _elbo(process: Process, t: Tensor) -> Tensor:
    if not process.discrete:
        # -1/2 d SNR/dt = -SNR lam', written without dividing by alpha.
        alpha, sigma = floored(process, t)
        slope = alpha * process.dsigma(t) - sigma * process.dalpha(t)
        return alpha * slope / sigma**3
    index = process.step_index(t)
    before = _snr(process, process.time_of_index((index - 1).clamp_min(0), torch.float64))
    before = torch.where(index > 0, before, 2.0 * _snr(process, t))
    return 0.5 * (before - _snr(process, t))


@WEIGHTINGS.register
class ELBOWeighting(Part):
    """Variational bound: -1/2 dSNR/dt per unit t; discrete: (SNR_{i-1} - SNR_i)/2.

    Index 0 of a discrete process has SNR_0 / 2: a Gaussian decoder of variance 1/SNR_0.
    """

    kind: Literal["elbo"] = "elbo"

    def build(self, process: Process) -> Weighting:
        return DataWeighting(process, _elbo)
