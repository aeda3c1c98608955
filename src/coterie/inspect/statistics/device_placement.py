"""Which expert on which device: greedy placement with copies of hot experts, and what it leaves.

In expert-parallel layers every step lasts as long as its busiest device. Experts are placed longest
first onto the least loaded device (LPT: Graham 1969, at most 4/3 - 1/(3 D) times the best where any
device may hold any number). Spare places go to copies, each to the expert that has most rows per
copy. Legend: E experts, D devices, rows = tokens times experts per token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.core.errors import ConfigError, describe
from coterie.inspect.statistics.formulas import Array

STRATEGIES = ("in order", "greedy", "greedy with copies")


@dataclass(frozen=True, eq=False)
class Placement:
    """``devices[e]``: those that hold expert e, its rows shared evenly; ``rows`` [D]: of each
    device; ``held`` [D]: how many experts it holds."""

    devices: tuple[tuple[int, ...], ...]
    rows: Array
    held: Array

    @property
    def makespan(self) -> float:
        """Rows of the busiest device."""
        return float(self.rows.max())

    @property
    def ideal(self) -> float:
        """Rows of each device if all were equal: no placement has less."""
        return float(self.rows.mean())

    @property
    def copies(self) -> int:
        return sum(map(len, self.devices))


@dataclass(frozen=True)
class RowCost:
    """Seconds of a device for the rows of the experts it holds: measured on one device."""

    per_row: float
    per_expert: float = 0.0

    def seconds(self, placement: Placement) -> Array:
        """f64 [D]."""
        busy = placement.rows > 0
        return self.per_row * placement.rows + self.per_expert * placement.held * busy


def fit_cost(rows: Sequence[int], seconds: Sequence[float]) -> RowCost:
    """The line through measured calls of one expert; neither part is negative."""
    slope, start = np.polyfit(np.asarray(rows, float), np.asarray(seconds, float), 1)
    if slope <= 0 or start < 0:
        slope, start = max(slope, min(s / r for r, s in zip(rows, seconds, strict=True))), 0.0
    return RowCost(float(slope), float(start))


def place(loads: Sequence[float] | Array, devices: int, places: int | None = None) -> Placement:
    """Experts with ``loads`` [E] rows on ``devices``. ``places``: how many experts a device may
    hold; more than E / D leaves room for copies (None: any number, and no copies).

    ConfigError where not every expert finds a place, or a load is negative or not finite.
    """
    rows = _checked(loads, devices)
    count = len(rows)
    if places is not None and places * devices < count:
        hint = f"{count} experts on {devices} devices"
        allowed = f"{math.ceil(count / devices)} or more"
        raise ConfigError(describe("places", places, allowed, hint))
    copies = np.ones(count, dtype=int)
    if places is not None:
        copies = _copies(rows, devices, devices * places)
    return _longest_first(rows, copies, devices, places)


def in_order(loads: Sequence[float] | Array, devices: int) -> Placement:
    """Experts in their order, as many on each device as on any other (the usual layout). Of more
    devices than experts the last have none."""
    rows = _checked(loads, devices)
    each = math.ceil(len(rows) / devices)
    return _placed(rows, [(expert // each,) for expert in range(len(rows))], devices)


def _checked(loads: Sequence[float] | Array, devices: int) -> Array:
    rows = np.asarray(loads, dtype=np.float64)
    if devices < 1:
        raise ConfigError(describe("devices", devices, "1 or more"))
    if rows.ndim != 1 or not len(rows) or not np.isfinite(rows).all() or (rows < 0).any():
        raise ConfigError(describe("loads", rows.tolist(), "[E] finite numbers of rows"))
    return rows


def _copies(rows: Array, devices: int, places: int) -> np.ndarray:
    """How many copies each expert gets: one, and of the places that are left each to the expert
    with most rows per copy; at most one on each device."""
    copies = np.ones(len(rows), dtype=int)
    waiting = [(-load, expert) for expert, load in enumerate(rows)]
    heapq.heapify(waiting)
    left = places - len(rows)
    while left > 0 and waiting:
        load, expert = heapq.heappop(waiting)
        if load == 0.0:
            break
        if copies[expert] < devices:
            copies[expert] += 1
            left -= 1
            heapq.heappush(waiting, (-rows[expert] / copies[expert], expert))
    return copies


def _longest_first(rows: Array, copies: np.ndarray, devices: int, places: int | None) -> Placement:
    """Each copy to the least loaded device with room that does not hold the expert yet."""
    parts = [(rows[e] / copies[e], e) for e in range(len(rows)) for _ in range(copies[e])]
    parts.sort(key=lambda part: (-part[0], part[1]))
    busy, held = np.zeros(devices), np.zeros(devices, dtype=int)
    found: list[list[int]] = [[] for _ in rows]
    for part, expert in parts:
        free = np.ones(devices, dtype=bool) if places is None else held < places
        apart = free.copy()
        apart[found[expert]] = False
        if not apart.any():  # every device with room has it: the copy would change nothing
            continue
        device = int(np.flatnonzero(apart)[busy[apart].argmin()])
        busy[device] += part
        held[device] += 1
        found[expert].append(device)
    return _placed(rows, [tuple(sorted(where)) for where in found], devices)


def _placed(rows: Array, where: Sequence[tuple[int, ...]], devices: int) -> Placement:
    busy, held = np.zeros(devices), np.zeros(devices)
    for expert, there in enumerate(where):
        for device in there:
            busy[device] += rows[expert] / len(there)
            held[device] += 1
    return Placement(tuple(where), busy, held)


def strategies(
    loads: Array, devices: int, spare: int, cost: RowCost | None = None
) -> dict[str, Placement]:
    """By name: in order, longest first, and longest first with ``spare`` places for copies on each
    device beyond those that E experts need.

    A strategy that extends another is never slower (by ``cost``; None: rows alone count): where
    longest first or copies would be, it is what it extends.
    """
    each = math.ceil(len(loads) / devices)
    slowest = cost or RowCost(1.0)
    tried = (place(loads, devices, each), place(loads, devices, each + spare))
    best = [in_order(loads, devices)]
    for more in tried:
        faster = slowest.seconds(more).max() < slowest.seconds(best[-1]).max()
        best.append(more if faster else best[-1])
    return dict(zip(STRATEGIES, best, strict=True))
