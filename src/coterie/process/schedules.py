"""Processes with a closed form: vp_linear, cosine, rectified_flow, ve, trig.

Constants: VP linear, Song et al. 2021 (arXiv:2011.13456); cosine, Nichol and Dhariwal 2021
(arXiv:2102.09672); VE, Karras et al. 2022 (arXiv:2206.00364); rectified flow, Liu et al. 2022
(arXiv:2209.03003), time shift of Esser et al. 2024 (arXiv:2403.03206); trig, Albergo and
Vanden-Eijnden 2023 (arXiv:2209.15571).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.process.base import PROCESSES, Process


class _UnitTime(Part):
    """Fields of every closed-form process whose time is in [0, 1]."""

    num_steps: int = Field(1000, ge=2, le=10**6)  # number of steps of the original grid
    t_min: float = 1e-3  # least time at which the network is called
    t_max: float = 1.0  # time at which sampling starts

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not 0.0 < self.t_min < self.t_max:
            raise ConfigError(
                describe("t_min", self.t_min, f"above 0 and below t_max = {self.t_max}")
            )
        if self.t_max > 1.0:
            raise ConfigError(describe("t_max", self.t_max, "at most 1"))
        return self


class _VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, hence sigma' = -alpha alpha' / sigma."""

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.dalpha(t) / self.sigma(t)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """alpha = exp(-(beta_min t + (beta_max - beta_min) t^2 / 2) / 2)."""

    num_steps: int
    t_min: float
    t_max: float
    beta_min: float
    beta_max: float

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * self.alpha(t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        integral = F.softplus(-2.0 * lam)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2.0 * slope * integral)
        return 2.0 * integral / (self.beta_min + root)


@PROCESSES.register
class VPLinearConfig(_UnitTime):
    """Variance preserving, with beta(t) = beta_min + (beta_max - beta_min) t."""

    kind: Literal["vp_linear"] = "vp_linear"
    beta_min: float = Field(0.1, gt=0)  # noise rate at t = 0
    beta_max: float = Field(20.0, gt=0)  # noise rate at t = 1

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.beta_max < self.beta_min:
            allowed = f"at least beta_min = {self.beta_min}"
            raise ConfigError(describe("beta_max", self.beta_max, allowed))
        return self

    def build(self) -> VPLinear:
        return VPLinear(self.num_steps, self.t_min, self.t_max, self.beta_min, self.beta_max)


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s))."""

    num_steps: int
    t_min: float
    t_max: float
    s: float

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        # sin(pi/2 - a) keeps full precision where alpha goes to 0.
        return torch.sin(self._rate * (1.0 - t)) / math.cos(self._rate * self.s)

    def sigma(self, t: Tensor) -> Tensor:
        # cos^2 b - cos^2 a = sin(a-b) sin(a+b): no cancellation where sigma goes to 0.
        product = torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2.0 * self.s))
        return torch.sqrt(product) / math.cos(self._rate * self.s)

    def dalpha(self, t: Tensor) -> Tensor:
        return -self._rate * torch.sin(self._rate * (t + self.s)) / math.cos(self._rate * self.s)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        b = self._rate * self.s
        sine = torch.sqrt(math.sin(b) ** 2 + torch.sigmoid(-2.0 * lam) * math.cos(b) ** 2)
        cosine = torch.sqrt(torch.sigmoid(2.0 * lam)) * math.cos(b)
        return torch.atan2(sine, cosine) / self._rate - self.s


@PROCESSES.register
class CosineConfig(_UnitTime):
    """Variance preserving, with the cosine schedule in continuous time."""

    kind: Literal["cosine"] = "cosine"
    t_max: float = 0.995  # where sampling starts; at t = 1 alpha would be 0
    s: float = Field(0.008, ge=0)  # offset that keeps the noise near t = 0 from being too small

    def build(self) -> Cosine:
        return Cosine(self.num_steps, self.t_min, self.t_max, self.s)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """alpha = 1 - t', sigma = t' with t' = shift t / (1 + (shift - 1) t)."""

    num_steps: int
    t_min: float
    t_max: float
    shift: float

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.dsigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.shift / (1.0 + (self.shift - 1.0) * t).square()

    def time_of_lam(self, lam: Tensor) -> Tensor:
        # lam = log((1-t)/t) - log(shift)
        return torch.sigmoid(-lam - math.log(self.shift))

    def time_input(self, t: Tensor) -> Tensor:
        """f32: 1000 sigma, so that the shift moves steps and not what the network sees."""
        return (1000.0 * self.sigma(t)).float()


@PROCESSES.register
class RectifiedFlowConfig(_UnitTime):
    """Straight paths from data to noise: alpha = 1 - t, sigma = t (without shift)."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    shift: float = Field(1.0, gt=0)
    """above 1, more of the time is noisy: lam becomes lam - log(shift)"""

    def build(self) -> RectifiedFlow:
        return RectifiedFlow(self.num_steps, self.t_min, self.t_max, self.shift)


@dataclass(frozen=True)
class VarianceExploding(Process):
    """alpha = 1, sigma = t. Unit time and grid indices are uniform in log sigma."""

    num_steps: int
    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def unit_time(self, t: Tensor) -> Tensor:
        unit = torch.log(t / self.t_min) / math.log(self.t_max / self.t_min)
        return unit.clamp(0.0, 1.0)

    def time_of_unit(self, unit: Tensor) -> Tensor:
        return self.t_min * torch.exp(unit * math.log(self.t_max / self.t_min))

    def time_input(self, t: Tensor) -> Tensor:
        """f32: 1000 ln(sigma) / 4, the noise input of Karras et al. on the scale of 1000 t."""
        return (250.0 * torch.log(t)).float()


@PROCESSES.register
class VarianceExplodingConfig(Part):
    """Variance exploding (EDM): alpha = 1, and time is sigma."""

    kind: Literal["ve"] = "ve"
    num_steps: int = Field(1000, ge=2, le=10**6)  # number of steps of the original grid
    sigma_min: float = Field(0.002, gt=0)  # least noise level
    sigma_max: float = Field(80.0, gt=0)  # greatest noise level, where sampling starts

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.sigma_max <= self.sigma_min:
            allowed = f"above sigma_min = {self.sigma_min}"
            raise ConfigError(describe("sigma_max", self.sigma_max, allowed))
        return self

    def build(self) -> VarianceExploding:
        return VarianceExploding(self.num_steps, self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Trig(Process):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    num_steps: int
    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return torch.atan(torch.exp(-lam)) * (2.0 / math.pi)


@PROCESSES.register
class TrigConfig(_UnitTime):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2); flow is pi/2 times the v-prediction."""

    kind: Literal["trig"] = "trig"

    def build(self) -> Trig:
        return Trig(self.num_steps, self.t_min, self.t_max)
