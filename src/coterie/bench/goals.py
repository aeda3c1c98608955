"""What a benchmark set out to reach: a figure, the goal, whether it was met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.bench.timing import Times, fastest, median_ratio, milliseconds, ratios, spread


def goal(
    name: str, what: str, figure: float | None, bound: float, at_most: bool, **more: Any
) -> dict[str, Any]:
    """One row ``{goal, what, figure, bound, met, ...}``; ``met`` None: not measured.

    ``figure`` has four significant digits: a difference of 2e-7 is not 0.
    """
    met = None if figure is None else (figure <= bound if at_most else figure >= bound)
    sign = "<=" if at_most else ">="
    shown = None if figure is None else float(f"{figure:.4g}")
    row = {"goal": name, "what": what, "figure": shown, "bound": f"{sign} {bound}", "met": met}
    return {**row, **more}


def timed(
    name: str,
    what: str,
    times: Times,
    ours: str,
    peers: Sequence[str],
    bound: float,
    at_most: bool = True,
) -> dict[str, Any]:
    """A goal on the time of ``ours`` over that of the fastest of ``peers``; with ``at_most`` False,
    on how many times as fast as that peer it is. The row has both figures, ``ours_ms`` and
    ``peer_ms``, who the ``peer`` is, and the ``spread`` of the ratio over rounds.
    """
    peer = fastest(times, peers)
    pair = (ours, peer) if at_most else (peer, ours)
    values = ratios(times, pair[0], [pair[1]])
    return goal(
        name,
        what,
        median_ratio(values),
        bound,
        at_most,
        spread=spread(values),
        ours_ms=milliseconds(times, ours),
        peer=peer or None,
        peer_ms=milliseconds(times, peer),
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes) by least squares: 1 = linear growth, 0 = none."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
