"""Time grids of a sampling run: f64 [steps + 1], from noise to the clean end.

Every grid starts at ``t_max`` (``respaced``: at its first index) and ends at the time where sigma
is 0, so N steps take N denoiser calls with a first-order solver. Processes with alpha = 0 at
``t_max`` (rectified_flow, trig) start there too; grids in lam or sigma/alpha place their other
points as if lam began at -6.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part, Registry
from coterie.process import Process

GRIDS = Registry("grid", "coterie.grids")

_LAM_FLOOR = -6.0


class GridConfig(Part):
    """Configuration of a grid; ``build(process, steps)`` gives the times."""

    def build(self, process: Process, steps: int) -> Tensor:
        """f64 [steps + 1]: the times, from noise to clean."""
        raise TypeError(f"{type(self).__name__} declares no build()")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(describe("steps", steps, "an integer >= 1"))


def _equal(process: Process, steps: int) -> Tensor:
    return torch.linspace(process.t_max, process.t_clean, steps + 1, dtype=torch.float64)


def _lam_range(process: Process) -> tuple[float, float]:
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    low, high = process.lam(ends).tolist()
    return (low if low > float("-inf") else _LAM_FLOOR), high


def _from_lams(process: Process, lam: Tensor) -> Tensor:
    """Times of ``lam``, its ends put exactly at t_max and t_min, and the clean end."""
    times = process.time_of_lam(lam)
    times[-1] = process.t_min
    times[0] = process.t_max
    return torch.cat([times, times.new_tensor([process.t_clean])])


@GRIDS.register
class UniformGrid(GridConfig):
    """Equal steps in t."""

    kind: Literal["uniform"] = "uniform"

    def build(self, process: Process, steps: int) -> Tensor:
        _check_steps(steps)
        return _equal(process, steps)


@GRIDS.register
class LambdaGrid(GridConfig):
    """Equal steps in lam = log(alpha/sigma) down to ``t_min``, then clean."""

    kind: Literal["lambda"] = "lambda"

    def build(self, process: Process, steps: int) -> Tensor:
        _check_steps(steps)
        low, high = _lam_range(process)
        return _from_lams(process, torch.linspace(low, high, steps, dtype=torch.float64))


@GRIDS.register
class KarrasGrid(GridConfig):
    """Equal steps in (sigma/alpha)^(1/rho) down to ``t_min``, then clean (arXiv:2206.00364)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(7.0, gt=0)  # larger: more steps at low noise

    def build(self, process: Process, steps: int) -> Tensor:
        _check_steps(steps)
        low, high = torch.tensor(_lam_range(process), dtype=torch.float64)
        first, last = torch.exp(-low / self.rho), torch.exp(-high / self.rho)
        share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
        return _from_lams(process, -self.rho * torch.log(first + share * (last - first)))


@GRIDS.register
class ShiftGrid(GridConfig):
    """Equal steps in t, moved towards noise.

    r -> shift r / (1 + (shift - 1) r), r = position from clean to t_max. For rectified flow this is
    lam -> lam - log(shift) (arXiv:2403.03206).
    """

    kind: Literal["shift"] = "shift"
    shift: float = Field(3.0, gt=0)  # above 1: more steps at high noise

    def build(self, process: Process, steps: int) -> Tensor:
        _check_steps(steps)
        span = process.t_max - process.t_clean
        r = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        return process.t_clean + span * self.shift * r / (1.0 + (self.shift - 1.0) * r)


@GRIDS.register
class RespacedGrid(GridConfig):
    """A subset of a discrete process's T indices, then clean.

    leading: i floor(T/N) + offset, i < N. trailing: round(T - i T/N) - 1. linspace: N rounded
    points from 0 to T-1. Rounding is half to even.
    """

    kind: Literal["respaced"] = "respaced"
    spacing: Literal["leading", "trailing", "linspace"] = "linspace"  # rule that picks the indices
    offset: int = Field(0, ge=0)  # added to the indices of ``leading``

    def indices(self, num_steps: int, steps: int) -> Tensor:
        """i64 [steps], falling."""
        _check_steps(steps)
        if steps > num_steps:
            raise ConfigError(describe("steps", steps, f"at most {num_steps}, the model's grid"))
        if self.spacing == "leading":
            index = torch.arange(steps) * (num_steps // steps) + self.offset
            if int(index[-1]) >= num_steps:
                allowed = f"at most {num_steps - 1 - int(index[-1]) + self.offset} at these steps"
                raise ConfigError(describe("offset", self.offset, allowed))
            return index.flip(0)
        if self.spacing == "trailing":
            position = num_steps - torch.arange(steps, dtype=torch.float64) * num_steps / steps
            return position.round().long() - 1
        if steps == 1:
            return torch.tensor([num_steps - 1])
        return torch.linspace(num_steps - 1, 0, steps, dtype=torch.float64).round().long()

    def build(self, process: Process, steps: int) -> Tensor:
        if not process.discrete:
            allowed = "a discrete process (ddpm)"
            hint = "use the uniform grid for continuous time"
            raise ConfigError(describe("process", type(process).__name__, allowed, hint))
        times = process.time_of_index(self.indices(process.num_steps, steps), torch.float64)
        return torch.cat([times, times.new_tensor([process.t_clean])])
