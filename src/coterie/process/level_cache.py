"""A process that computes alpha and sigma once per noise level.

A sampler needs them at the few times of its grid, but many times: at the end of one step and the
start of the next, for every conversion of a prediction, and in each run on the same grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from coterie.process.base import Process

_MOST = 16384  # numbers kept

Number = float | Tensor
"""Of a noise level: a float where it is the same for the whole batch, else f64 [B]."""


class Remembered(Process):
    """A process whose values are cached for the times of a grid (0-dimensional float64 on the CPU).

    At other times it calls ``inner``.
    """

    def __init__(self, inner: Process) -> None:
        self.inner = inner
        self._known: dict[tuple[str, float], Tensor] = {}
        self._weights: dict[tuple[Any, ...], tuple[float, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def discrete(self) -> bool:
        return self.inner.discrete

    @property
    def t_clean(self) -> float:
        return self.inner.t_clean

    def _look_up(self, name: str, work_out: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        if not _of_grid(t):
            return work_out(t)
        key = name, float(t)
        value = self._known.get(key)
        if value is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            with torch.inference_mode(False):  # others may differentiate what they multiply
                value = self._known[key] = work_out(t.clone() if t.is_inference() else t)
        return value

    def weights(
        self, work_out: Callable[..., Sequence[Tensor]], at: Sequence[Number], told: Sequence[Any]
    ) -> Sequence[Number]:
        """See :func:`weights`."""
        for value in at:
            if not _of_grid(value):
                return work_out(self, *at, *told)
        key = (work_out, *map(float, at), *told)
        made = self._weights.get(key)
        if made is None:
            if len(self._weights) >= _MOST:
                self._weights.clear()
            made = self._weights[key] = tuple(map(float, work_out(self, *at, *told)))
        return made

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up("alpha", self.inner.alpha, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up("sigma", self.inner.sigma, t)

    def dalpha(self, t: Tensor) -> Tensor:
        return self._look_up("dalpha", self.inner.dalpha, t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self._look_up("dsigma", self.inner.dsigma, t)

    def lam(self, t: Tensor) -> Tensor:
        return self._look_up("lam", self.inner.lam, t)

    def dlam(self, t: Tensor) -> Tensor:
        return self._look_up("dlam", self.inner.dlam, t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return self._look_up("time_of_lam", self.inner.time_of_lam, lam)

    def unit_time(self, t: Tensor) -> Tensor:
        return self.inner.unit_time(t)

    def time_of_unit(self, unit: Tensor) -> Tensor:
        return self.inner.time_of_unit(unit)

    def step_index(self, t: Tensor) -> Tensor:
        return self.inner.step_index(t)

    def time_of_index(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.time_of_index(index, dtype)

    def time_input(self, t: Tensor) -> Tensor:
        return self.inner.time_input(t)


def _of_grid(t: Number) -> bool:
    """Whether this is one number on the CPU, a time of a grid, which comes again."""
    if isinstance(t, float):
        return True
    return t.dtype is torch.float64 and t.is_cpu and not t.dim() and not t.requires_grad


def weights(
    process: Process,
    work_out: Callable[..., Sequence[Tensor]],
    *at: Number,
    told: Sequence[Any] = (),
) -> Sequence[Number]:
    """The coefficients ``work_out(process, *at, *told)`` of a solver step at the noise levels
    ``at``.

    Floats, cached, if ``process`` is :class:`Remembered` and ``at`` are times of a grid; tensors
    [B] if samples are at different times.
    """
    if isinstance(process, Remembered):
        return process.weights(work_out, at, told)
    return work_out(process, *at, *told)


class OneCall(Process):
    """A process during one call of a denoiser: it caches its coefficients for that call's times
    [B]."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.num_steps, self.t_min, self.t_max = process.num_steps, process.t_min, process.t_max
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def _ask(self, name: str, t: Tensor) -> Tensor:
        known = self._known.get(name)
        if known is None or known[0] is not t:
            known = self._known[name] = t, getattr(self.process, name)(t)
        return known[1]

    def alpha(self, t: Tensor) -> Tensor:
        return self._ask("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._ask("sigma", t)

    def dalpha(self, t: Tensor) -> Tensor:
        return self._ask("dalpha", t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self._ask("dsigma", t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return self.process.time_of_lam(lam)


@lru_cache(maxsize=32)
def _shared(process: Process) -> Remembered:
    return Remembered(process)


def remembered(process: Process) -> Process:
    """``process`` with cached noise levels; equal processes share one cache."""
    if isinstance(process, Remembered):
        return process
    try:
        return _shared(process)
    except TypeError:  # it cannot be hashed
        return Remembered(process)
