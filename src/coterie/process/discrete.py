"""The discrete-time DDPM process (Ho et al. 2020, arXiv:2006.11239), usable at any time.

Grid index i in 0..T-1 sits at time t = i / (T-1), where alpha and sigma are exact. Between grid
points lam = log(alpha/sigma) is a monotone cubic Hermite spline (slopes: harmonic means of the
neighbouring differences), so alpha and sigma are continuously differentiable and any solver runs.
The clean end is "index -1", t = -1/(T-1): below index 0, sigma goes linearly to 0. Where the last
index is pure noise (zero terminal SNR, Lin et al. 2024, arXiv:2305.08891), alpha goes linearly to 0
in the last interval, as lam has no end there.
Only the table of lam is kept; alpha^2 and sigma^2 are sigmoids of +-2 lam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.process.base import PROCESSES, Process

Betas = Literal["linear", "scaled_linear", "cosine", "table"]
Table = tuple[float, ...]

_BISECTIONS = 52  # one grid interval to float64 precision


def make_betas(schedule: str, num_steps: int, start: float, end: float) -> Tensor:
    """f64 [num_steps]: variances of the forward steps. ``cosine`` ignores start and end."""
    if schedule == "linear":
        return torch.linspace(start, end, num_steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        roots = torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64)
        return roots.square()
    s = 0.008
    at = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    bar = torch.cos((at + s) / (1.0 + s) * math.pi / 2).square()
    return (1.0 - bar[1:] / bar[:-1]).clamp(max=0.999)


@lru_cache(maxsize=32)
def _tables(
    schedule: str, num_steps: int, start: float, end: float, squares: Table
) -> tuple[Tensor, Tensor]:
    """lam at every index before pure noise and the spline's slopes there, f64 each."""
    with torch.device("cpu"):  # cached: must not be of the device a model is being built on
        if schedule == "table":
            log_bar = torch.tensor(squares, dtype=torch.float64).log()
        else:
            log_bar = torch.log1p(-make_betas(schedule, num_steps, start, end)).cumsum(0)
        return _lam_and_slopes(log_bar[torch.isfinite(log_bar)])


def _lam_and_slopes(log_bar: Tensor) -> tuple[Tensor, Tensor]:
    lam = 0.5 * (log_bar - torch.log(-torch.expm1(log_bar)))
    rise = lam.diff()
    inner = 2.0 * rise[1:] * rise[:-1] / (rise[1:] + rise[:-1])
    return lam, torch.cat([rise[:1], inner, rise[-1:]])


@dataclass(frozen=True)
class DDPM(Process):
    """Discrete variance-preserving process; the module describes it between grid times."""

    schedule: str
    num_steps: int
    beta_start: float
    beta_end: float
    alphas_cumprod: Table = ()

    # A frozen dataclass field would be settable per object; these two follow from the grid.
    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return 1.0

    @property
    def discrete(self) -> bool:
        return True

    @property
    def t_clean(self) -> float:
        return -1.0 / (self.num_steps - 1)

    def betas(self) -> Tensor:
        """f64 [num_steps]: the forward variances the process was defined by."""
        if self.schedule == "table":
            bar = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
            return 1.0 - bar[1:] / bar[:-1]
        return make_betas(self.schedule, self.num_steps, self.beta_start, self.beta_end)

    @property
    def ends_in_noise(self) -> bool:
        """Whether alpha is 0 at the last index."""
        return self.schedule == "table" and self.alphas_cumprod[-1] == 0.0

    def _lam_slopes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        lam, slopes = _tables(
            self.schedule, self.num_steps, self.beta_start, self.beta_end, self.alphas_cumprod
        )
        return lam.to(device), slopes.to(device)

    def _position(self, t: Tensor) -> Tensor:
        """f64 index of ``t``; times that are a grid time up to their rounding become exact."""
        position = t.double() * (self.num_steps - 1)
        nearest = position.round()
        tolerance = 8.0 * torch.finfo(t.dtype).eps * self.num_steps
        return torch.where((position - nearest).abs() < tolerance, nearest, position)

    def _lam64(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """lam and d lam / d index at ``t``, both f64."""
        lam, slopes = self._lam_slopes(t.device)
        last = len(lam) - 1
        position = self._position(t).clamp(-1.0, self.num_steps - 1)
        k = position.floor().long().clamp(0, last - 1)
        value, slope = _hermite(position.clamp(0.0, last) - k, lam, slopes, k)
        first = torch.sigmoid(-2.0 * lam[0]).sqrt()
        sigma = first * (1.0 + position)
        below = position < 0
        edge = 0.5 * torch.log1p(-sigma.square()) - sigma.log()
        edge_slope = -first / (sigma * (1.0 - sigma.square()))
        value, slope = torch.where(below, edge, value), torch.where(below, edge_slope, slope)
        if self.ends_in_noise:
            fall = torch.sigmoid(2.0 * lam[-1]).sqrt()
            alpha = fall * (self.num_steps - 1.0 - position)
            above = position > last
            edge = alpha.log() - 0.5 * torch.log1p(-alpha.square())
            edge_slope = -fall / (alpha * (1.0 - alpha.square()))
            value, slope = torch.where(above, edge, value), torch.where(above, edge_slope, slope)
        return value, slope

    def lam(self, t: Tensor) -> Tensor:
        return self._lam64(t)[0].to(t.dtype)

    def dlam(self, t: Tensor) -> Tensor:
        return (self._lam64(t)[1] * (self.num_steps - 1)).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2.0 * self._lam64(t)[0]).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2.0 * self._lam64(t)[0]).sqrt().to(t.dtype)

    def dalpha(self, t: Tensor) -> Tensor:
        lam, slope = self._lam64(t)
        rate = torch.sigmoid(2.0 * lam).sqrt() * torch.sigmoid(-2.0 * lam) * slope
        return (self._at_noise(lam, rate, -1.0) * (self.num_steps - 1)).to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        lam, slope = self._lam64(t)
        rate = -torch.sigmoid(-2.0 * lam).sqrt() * torch.sigmoid(2.0 * lam) * slope
        return (self._at_noise(lam, rate, 0.0) * (self.num_steps - 1)).to(t.dtype)

    def _at_noise(self, lam: Tensor, rate: Tensor, falls: float) -> Tensor:
        """``rate`` per index; where alpha is 0 and lam has no slope, ``falls`` times the alpha of
        the index before."""
        if not self.ends_in_noise:
            return rate
        before = self.alphas_cumprod[-2] ** 0.5
        return torch.where(lam == -math.inf, falls * before, rate)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        """Noisier than the last index: that index. Cleaner than index 0: the linear end."""
        table, slopes = self._lam_slopes(lam.device)
        goal = lam.double()
        last = len(table) - 1
        k = torch.searchsorted(-table, -goal).sub(1).clamp(0, last - 1)
        low, high = torch.zeros_like(goal), torch.ones_like(goal)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            cleaner = _hermite(middle, table, slopes, k)[0] > goal
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        first = torch.sigmoid(-2.0 * table[0]).sqrt()
        edge = torch.sigmoid(-2.0 * goal).sqrt() / first - 1.0
        position = torch.where(goal > table[0], edge, k + 0.5 * (low + high))
        end = torch.full_like(goal, last)
        if self.ends_in_noise:
            end += 1.0 - torch.sigmoid(2.0 * goal).sqrt() / torch.sigmoid(2.0 * table[-1]).sqrt()
        position = torch.where(goal <= table[-1], end, position)
        return (position / (self.num_steps - 1)).to(lam.dtype)

    def time_input(self, t: Tensor) -> Tensor:
        """f32: the index, an exact integer at grid times, fractional between them."""
        return self._position(t).clamp(0, self.num_steps - 1).float()


def _hermite(f: Tensor, values: Tensor, slopes: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Cubic on [k, k+1] at offset ``f``: value and slope."""
    left, rise = values[k], values[k + 1] - values[k]
    m0, m1 = slopes[k], slopes[k + 1]
    c2, c3 = 3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise
    return left + f * (m0 + f * (c2 + f * c3)), m0 + f * (2.0 * c2 + 3.0 * f * c3)


_DEFAULT_BETAS = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": (0.0, 0.0),
    "table": (0.0, 0.0),
}


@PROCESSES.register
class DDPMConfig(Part):
    """The discrete process of DDPM (arXiv:2006.11239).

    Unset betas are the published ones for 1000 steps, times 1000 / num_steps.
    """

    kind: Literal["ddpm"] = "ddpm"
    schedule: Betas = "linear"
    """of the forward variances beta; ``table``: given by ``alphas_cumprod``"""
    num_steps: int = Field(1000, ge=2, le=10**6)  # number of steps T of the original grid
    beta_start: float | None = Field(None, gt=0, lt=1)
    """variance of the first step; None: the published one"""
    beta_end: float | None = Field(None, gt=0, lt=1)
    """variance of the last step; None: the published one"""
    alphas_cumprod: Table = Field((), repr=False)
    """Alpha^2 of every step, for the schedule ``table`` alone; it falls, to 0 at the last step if
    that is pure noise."""

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.schedule in ("cosine", "table"):
            for name in ("beta_start", "beta_end"):
                if getattr(self, name) is not None:
                    hint = f"{self.schedule} has no betas to set"
                    raise ConfigError(describe(name, getattr(self, name), "null", hint))
        start, end = self._betas()
        if start > end:
            raise ConfigError(describe("beta_end", end, f"at least beta_start = {start}"))
        return self

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        bar = self.alphas_cumprod
        if self.schedule != "table":
            if bar:
                raise ConfigError(describe("schedule", self.schedule, "table", "alphas are given"))
            return self
        if len(bar) != self.num_steps:
            allowed = f"num_steps = {self.num_steps} of them"
            raise ConfigError(describe("alphas_cumprod", f"{len(bar)} numbers", allowed))
        for index, (one, following) in enumerate(pairwise((1.0, *bar))):
            if not (one > following >= 0.0):
                allowed = f"below {one:g}, the one before, and not below 0"
                raise ConfigError(describe(f"alphas_cumprod.{index}", following, allowed))
        if bar[-1] == 0.0 and len(bar) < 3:
            raise ConfigError(describe("num_steps", len(bar), "3 or more where the last is noise"))
        return self

    def _betas(self) -> tuple[float, float]:
        scale = 1000.0 / self.num_steps
        start, end = (min(0.999, beta * scale) for beta in _DEFAULT_BETAS[self.schedule])
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    def build(self) -> DDPM:
        return DDPM(self.schedule, self.num_steps, *self._betas(), self.alphas_cumprod)
