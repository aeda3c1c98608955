"""Whether the dispatch of experts reaches its goals, from the times of one size's candidates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coterie.bench.expert_peers import DENSE_LAYER, EAGER, FLOOR, ONE_THREAD, is_limit, is_peer
from coterie.bench.goals import timed
from coterie.bench.timing import Times

LARGE = ("S2", "S2-b32", "B2", "fine64", "small")
FINE = ("fine64", "small")
SCALING = ("S2", "fine64")
_DENSE_BOUNDS = {"S2": (1.0, 1.05), "fine64": (1.15, 1.15), "small": (1.15, 1.15)}

Row = dict[str, Any]


def expert_goals(case: str, forward: Times, train: Times) -> list[Row]:
    """Rows of the goals P1 to P6 that this size has; where ``auto`` ran on one thread as well, P12
    and the bounds against a dense layer too. Where decoding is timed, ``forward`` has the times of
    reading as many bytes as the chosen experts have.
    """
    made = [*_on_any_threads(case, forward, train)]
    if limits := [name for name in forward if is_limit(name)]:
        what = f"{case}: bytes of touched experts per second, of what the machine reads"
        made.append(timed("P6", what, forward, "auto", limits, 0.8, at_most=False))
        made.append(timed("P6", f"{case}: over the plain loop", forward, "auto", ["loop"], 1.0))
    if ONE_THREAD in forward:
        made += _on_threads(case, forward, train)
    return made


def _on_any_threads(case: str, forward: Times, train: Times) -> Iterator[Row]:
    if case in LARGE:
        for name, passes, times, bound in _both("P1", "P4", forward, train, 1.08, 1.10):
            yield timed(
                name, f"{case}: {passes}, over the bare experts", times, "auto", [FLOOR], bound
            )
    if case in FINE:
        what = f"{case}: times as fast as the faster grouped product, forward"
        grouped = [name for name in forward if "grouped" in name]
        yield timed("P2", what, forward, "auto", grouped, 1.3, at_most=False)
    for name, passes, times, bound in _both("P3", "P3", forward, train, 1.05, 1.05):
        if "auto" in times:
            peers = [name for name in times if is_peer(name)]
            yield timed(
                name, f"{case}: {passes}, over the fastest peer", times, "auto", peers, bound
            )
    if case == "fine64":
        what = "fine64: times as fast as the usual loop, forward and backward"
        yield timed("P5", what, train, "auto", [EAGER], 3.0, at_most=False)


def _on_threads(case: str, forward: Times, train: Times) -> Iterator[Row]:
    if case in SCALING:
        for name, passes, times, bound in _both("P12", "P12", forward, train, 1.8, 1.8):
            what = f"{case}: {passes}, times as fast as on one thread"
            yield timed(name, what, times, "auto", [ONE_THREAD], bound, at_most=False)
    if case in _DENSE_BOUNDS:
        for name, passes, times, bound in _both(
            "threads", "threads", forward, train, *_DENSE_BOUNDS[case]
        ):
            what = f"{case}: {passes}, over a dense layer of equal active cost"
            yield timed(name, what, times, "auto", [DENSE_LAYER], bound)


def _both(
    first: str, second: str, forward: Times, train: Times, bound: float, train_bound: float
) -> tuple[tuple[str, str, Times, float], ...]:
    return (
        (first, "forward", forward, bound),
        (second, "forward and backward", train, train_bound),
    )
