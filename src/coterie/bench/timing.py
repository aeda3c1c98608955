"""Timing calls against each other: interleaved rounds, and medians of ratios within a round.

On one thread the clock is process CPU time, so other jobs on the machine disturb little; with more
threads it is wall time, and on a GPU wall time between synchronisations. A drift of the machine
cancels, since every candidate runs in every round and a ratio compares one round with itself.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from coterie.core.machine import commit, hardware

CHUNK = 0.03
"""s, least time measured at once: the clock ticks in microseconds, other jobs in milliseconds."""
_SHORT_ROUND = 1.0  # s

Times = dict[str, list[float]]
"""Seconds per call of each candidate, in every round."""


@dataclass(frozen=True)
class Place:
    """Where and in which type a benchmark runs."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1

    def clock(self) -> float:
        """Seconds from some start."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if self.threads == 1 else time.perf_counter()

    @contextmanager
    def entered(self) -> Iterator[Place]:
        """Torch with this many threads inside the block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield self
        finally:
            torch.set_num_threads(before)


def interleaved(calls: Mapping[str, Callable[[], Any]], place: Place, rounds: int) -> Times:
    """Every candidate in every round, back and forth. Short calls are repeated within a round, and
    get three times the rounds."""
    repeats, total = {}, 0.0
    for name, call in calls.items():
        call()  # warm-up
        start = place.clock()
        call()
        seconds = max(place.clock() - start, 1e-6)
        repeats[name] = max(1, min(50, int(CHUNK / seconds)))
        total += repeats[name] * seconds
    times: Times = {name: [] for name in calls}
    for turn in range(3 * rounds if total < _SHORT_ROUND else rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            start = place.clock()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append((place.clock() - start) / repeats[name])
    return times


def ratios(times: Times, name: str, others: Sequence[str]) -> list[float]:
    """Time of ``name`` over that of the fastest of ``others``, in each round; [] if not timed.

    Which of the others is fastest is decided on medians, so that noise cannot pick a new best in
    every round.
    """
    best = fastest(times, others)
    if name not in times or not best:
        return []
    return [ours / theirs for ours, theirs in zip(times[name], times[best])]


def fastest(times: Times, names: Sequence[str]) -> str:
    """The one of ``names`` with the least median; "" where none of them was timed."""
    known = [name for name in names if name in times]
    return min(known, key=lambda name: statistics.median(times[name]), default="")


def ratio(times: Times, name: str, others: Sequence[str]) -> float | None:
    """Median of ``ratios``; None where not timed."""
    return median_ratio(ratios(times, name, others))


def median_ratio(values: Sequence[float]) -> float | None:
    """To three decimals; None of nothing."""
    return round(statistics.median(values), 3) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Half the distance between the quartiles (of ratios, of seconds); of two or three values half
    of their range, of one None."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    if len(values) > 3:
        low, _, high = statistics.quantiles(values, n=4)
    return round((high - low) / 2, 4)


def milliseconds(times: Times, name: str) -> float | None:
    """Median per call; None where not timed."""
    return round(1e3 * statistics.median(times[name]), 3) if name in times else None


def versions(*packages: str) -> dict[str, str | None]:
    """Installed version of each peer's package, None where it is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def stamp(bench: str, place: Place, rounds: int, peers: Sequence[str] = ()) -> dict[str, Any]:
    """What a file of results begins with: what was timed, where, how, beside which versions."""
    return {
        "bench": bench,
        "commit": commit(),
        "hardware": hardware(),
        "device": place.device,
        "dtype": str(place.dtype).removeprefix("torch."),
        "threads": place.threads,
        "rounds": rounds,
        "peers": versions(*peers),
    }
