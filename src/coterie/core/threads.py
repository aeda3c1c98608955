"""The number of CPU threads for a computation, chosen by timing it.

On a machine that is busy with other work, two threads may be slower than one. So the computation
itself is timed with 1, 2, 4, ... threads, and again when it has become slow. Sums in torch may
differ in their last bits between numbers of threads, so results that must be reproducible to the
bit fix the number.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from coterie.core.errors import ConfigError, describe

ROUNDS = 5
CHUNK = 0.03  # s, least time measured at once
MOST_SECONDS = 10.0  # of one choice, once every candidate has been timed
SHARE = 0.02  # of the calls to come that choosing may cost, likewise
LEAST_CALLS = 4  # to come, for every call that choosing takes at the least
SLOW = 1.5  # a candidate is out when it has taken so many times the best one's time
PER_CORE = 4
BETTER = 0.95  # another number replaces the present one where it takes this share of its time


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_threads() -> int:
    """The largest number of threads that is tried: torch's own, which OMP_NUM_THREADS sets."""
    return max(1, min(cores(), torch.get_num_threads()))


def check_threads(count: int, field: str = "train.threads") -> None:
    """ConfigError unless 1 <= ``count`` <= ``PER_CORE`` threads per core, or OMP_NUM_THREADS if
    that is larger."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = max(PER_CORE * cores(), int(asked) if asked.isascii() and asked.isdigit() else 0)
    if not 1 <= count <= most:
        hint = f"there are {cores()} cores; OMP_NUM_THREADS={count} in the environment forces it"
        raise ConfigError(describe(field, count, f"1..{most}", hint))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside the block torch uses ``count`` threads; None: the number is not changed."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Asked:
    """What the user set: ``count`` threads (None: choose), and ``say``, called with the choice."""

    count: int | None = None
    say: Callable[[str], None] = lambda line: None


_NOTHING = Asked()
_ASKED: ContextVar[Asked] = ContextVar("asked", default=_NOTHING)


def asked() -> Asked:
    """The setting of the enclosing :func:`asking` block."""
    return _ASKED.get()


@contextmanager
def asking(count: int | None, say: Callable[[str], None]) -> Iterator[None]:
    """Inside the block ``count`` threads are used (None: as set, or as chosen by timing)."""
    if count is not None:
        check_threads(count, "--threads")
    token = _ASKED.set(Asked(count, say))
    try:
        with threads(count):
            yield
    finally:
        _ASKED.reset(token)


@dataclass(frozen=True)
class Choice:
    """A chosen number of threads; ``seconds``: median time of a call by number of threads."""

    threads: int
    seconds: Mapping[int, float]
    cost: float  # s that choosing took

    def line(self, what: str, flag: str) -> str:
        """The choice and its reason as one line of text."""
        others = ", ".join(f"{n}: {1e3 * s:.3g} ms" for n, s in sorted(self.seconds.items()))
        word = "thread" if self.threads == 1 else "threads"
        why = f"{what} with {others}" if others else "too short a run to time"
        return f"{self.threads} {word} ({why}); {flag} N fixes the number"


def candidates(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def choose(
    call: Callable[[], Any],
    most: int,
    present: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    ahead: int | None = None,
) -> Choice:
    """Time ``call`` with every number of threads in turn, back and forth, and compare medians.

    ``present`` is kept unless another number is clearly faster. On return the number of threads is
    as before. ``ahead``: how many such calls will follow; timing takes at most ``SHARE`` of their
    time (each candidate is timed once at least), and is skipped where it cannot pay off.
    """
    begin, tried = clock(), candidates(most)
    times: dict[int, list[float]] = {count: [] for count in tried}
    if len(tried) > 1 and pays(most, ahead):
        with threads(None):
            _take_turns(call, times, clock, ahead)
    medians = {count: statistics.median(each) for count, each in times.items() if each}
    best = min(medians, key=lambda count: (medians[count], count), default=present or most)
    if present in medians and medians[best] > BETTER * medians[present]:
        best = present
    return Choice(best, medians, clock() - begin)


def pays(most: int, ahead: int | None) -> bool:
    """Whether timing the candidates can pay off in ``ahead`` calls."""
    return ahead is None or ahead >= LEAST_CALLS * (len(candidates(most)) + 1)


def _take_turns(
    call: Callable[[], Any],
    times: dict[int, list[float]],
    clock: Callable[[], float],
    ahead: int | None,
) -> None:
    begin, left = clock(), list(times)
    torch.set_num_threads(left[0])
    call()  # caches
    for turn in range(ROUNDS):
        for count in left if turn % 2 == 0 else left[::-1]:
            torch.set_num_threads(count)
            best = min((min(each) for each in times.values() if each), default=None)
            times[count].append(_seconds(call, clock, best))
        usual = {count: statistics.median(times[count]) for count in left}
        best = min(usual.values())
        left = [count for count in left if usual[count] <= SLOW * best]
        allowed = MOST_SECONDS if ahead is None else min(MOST_SECONDS, SHARE * ahead * best)
        if len(left) == 1 or clock() - begin + sum(usual[count] for count in left) > allowed:
            return


def _seconds(call: Callable[[], Any], clock: Callable[[], float], best: float | None) -> float:
    """Of one call: alone where it is long or far from the ``best``, else the mean of several."""
    begin, done = clock(), 0
    while True:
        before = clock()
        call()
        done += 1
        passed = clock() - begin
        slow = best is not None and clock() - before > 3 * SLOW * best
        if passed >= CHUNK or done >= 50 or slow:
            return passed / done


class Watch:
    """Tells when repeated work has become slow, or may be faster with more threads.

    It compares medians over ``window`` calls. Choosing again takes about 1 % of the total time.
    """

    SLOWER = 1.3
    SHARE = 100.0

    def __init__(self, choice: Choice, most: int, window: int = 8) -> None:
        self._choice, self._most, self._window = choice, most, window
        self._recent: list[float] = []
        self._usual: float | None = None
        self._passed = 0.0

    def again(self, seconds: float) -> bool:
        """Whether to choose again, after a call that took ``seconds``."""
        self._passed += seconds
        self._recent.append(seconds)
        if len(self._recent) < self._window:
            return False
        median, self._recent = statistics.median(self._recent), []
        if self._usual is None:
            self._usual = median
            return False
        self._usual = min(self._usual, median)
        slow = median > self.SLOWER * self._usual and self._passed > 10 * self._choice.cost
        fewer = self._choice.threads < self._most
        return slow or (fewer and self._passed > self.SHARE * self._choice.cost)
