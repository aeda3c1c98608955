"""A noising process: ``x_t = alpha(t) x0 + sigma(t) eps``.

The variational, score and flow views of diffusion all follow from the pair (alpha, sigma). Time
runs from clean (``t_clean``) to noise (``t_max``). It is in [0, 1] for every process but ``ve``,
where it is sigma itself. Times keep their dtype and device: float64 in gives float64 out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from coterie.core.registry import Registry

PROCESSES = Registry("process", "coterie.processes")


def expand(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as ``like``; 0-dimensional values pass."""
    if value.dim() == 0:
        return value
    return value.reshape(-1, *[1] * (like.dim() - 1))


class Process(ABC):
    """A noising process. Subclasses are frozen dataclasses that define alpha and sigma.

    A denoiser is called at times in [``t_min``, ``t_max``]; at ``t_clean`` sigma is 0.
    ``num_steps`` is the length of the original grid that ``step_index`` refers to.
    """

    num_steps: int
    t_min: float
    t_max: float

    @property
    def discrete(self) -> bool:
        """Whether the process is defined, and trained, on grid times only."""
        return False

    @property
    def t_clean(self) -> float:
        """The time at which sigma is 0. A network is never called there."""
        return 0.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at ``t``."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time_of_lam(self, lam: Tensor) -> Tensor:
        """The time at which :meth:`lam` has this value."""

    def lam(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, log(alpha / sigma). It falls as noise grows."""
        return self.alpha(t).log() - self.sigma(t).log()

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def dlam(self, t: Tensor) -> Tensor:
        """d lam / dt."""
        return self.dalpha(t) / self.alpha(t) - self.dsigma(t) / self.sigma(t)

    def drift(self, t: Tensor) -> Tensor:
        """a(t) = alpha' / alpha of the forward equation dx = a x dt + g dW."""
        return self.dalpha(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)^2 = 2 sigma sigma' - 2 a sigma^2 (equal to -2 sigma^2 lam')."""
        sigma = self.sigma(t)
        return 2.0 * sigma * (self.dsigma(t) - self.drift(t) * sigma)

    def prior_std(self, t: float | None = None) -> float:
        """Standard deviation of the initial noise: sigma at ``t_max`` (or at ``t``)."""
        at = torch.tensor(self.t_max if t is None else t, dtype=torch.float64)
        return float(self.sigma(at))

    def unit_time(self, t: Tensor) -> Tensor:
        """Position of ``t`` in [0, 1] from clean to noise: ``t`` itself in most processes."""
        return t

    def time_of_unit(self, unit: Tensor) -> Tensor:
        """Inverse of :meth:`unit_time`."""
        return unit

    def step_index(self, t: Tensor) -> Tensor:
        """i64: nearest index 0..num_steps-1 of the original grid (0 = least noise)."""
        position = self.unit_time(t).double() * (self.num_steps - 1)
        return position.round().clamp(0, self.num_steps - 1).long()

    def time_of_index(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Time of a grid index; index -1 of a discrete process is its clean end."""
        unit = torch.as_tensor(index).double() / (self.num_steps - 1)
        return self.time_of_unit(unit).to(dtype)

    def time_input(self, t: Tensor) -> Tensor:
        """f32: input of a network's time embedding, by default 1000 t."""
        return (1000.0 * t).float()

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps; x0 and eps [B, ...], t [B] or 0-dimensional."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps
