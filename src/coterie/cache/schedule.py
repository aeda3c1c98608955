"""The steps of a sampling grid, found by exact equality of times.

Shapes: B samples, S steps of the grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe


@dataclass(frozen=True, eq=False)
class Steps:
    """The step of each sample of a call. ``groups``: rows of the batch at the same step."""

    of_rows: tuple[int, ...]

    @cached_property
    def groups(self) -> list[tuple[int, list[int]]]:
        found: dict[int, list[int]] = {}
        for row, step in enumerate(self.of_rows):
            found.setdefault(step, []).append(row)
        return list(found.items())


class Schedule:
    """S times of a sampling grid, and the step of each.

    A time matches if it equals the solver's float64 value, or that rounded to float32. Of equal
    times the first counts.
    """

    def __init__(self, times: Tensor | Iterable[float]) -> None:
        values = torch.as_tensor(times if isinstance(times, Tensor) else list(times))
        if values.dim() != 1 or not len(values) or not values.is_floating_point():
            shape = (tuple(values.shape), str(values.dtype))
            raise ConfigError(describe("times", shape, "a vector of at least one time"))
        if not bool(torch.isfinite(values).all()):
            raise ConfigError(describe("times", values.tolist(), "finite times"))
        self.times = values.detach().cpu().double()
        self._index = {
            dtype: {time: step for step, time in reversed(list(enumerate(rounded)))}
            for dtype, rounded in (
                (torch.float64, self.times.tolist()),
                (torch.float32, self.times.float().tolist()),
            )
        }

    def __len__(self) -> int:
        return len(self.times)

    def steps(self, t: Tensor) -> Steps:
        """t [B] -> the step of each; ConfigError for a time that is not of the grid."""
        index = self._index.get(t.dtype, self._index[torch.float32])
        found = []
        for time in t.tolist():
            if time not in index:
                shown = ", ".join(f"{value:g}" for value in self.times[:4].tolist())
                more = f", ... ({len(self)} times)" if len(self) > 4 else ""
                hint = "fold again with the times that this solver asks for"
                raise ConfigError(describe("t", time, f"{shown}{more}", hint))
            found.append(index[time])
        return Steps(tuple(found))


_STEPS: ContextVar[Steps | None] = ContextVar("coterie_schedule_steps", default=None)


def current() -> Steps:
    """The steps of the call in progress."""
    steps = _STEPS.get()
    if steps is None:
        raise ConfigError("cache: a folded layer answers inside a call of its denoiser only")
    return steps


class at:
    """Inside the block cached parts compute for these steps; local to thread and task.

    A class, not a generator, as it surrounds every call and must be cheap.
    """

    __slots__ = ("_steps", "_token")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __enter__(self) -> None:
        self._token = _STEPS.set(self._steps)

    def __exit__(self, *error: object) -> None:
        _STEPS.reset(self._token)
