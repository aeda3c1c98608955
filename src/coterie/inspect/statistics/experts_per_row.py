"""How many experts a row uses, where that varies: by layer, noise level, class and position.

Shapes: C classes, T noise bins, N positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import Joint, Place, RouterTrace
from coterie.inspect.statistics.formulas import Array
from coterie.inspect.statistics.routers import names

if TYPE_CHECKING:
    from coterie.inspect.statistics.trace import Trace


@dataclass(frozen=True, eq=False)
class Amounts:
    """Experts per row of one router, over conditional rows where there are any; NaN = no rows."""

    place: Place
    name: str
    mean: float
    p95: int  # 95 of 100 rows use at most so many
    most: int  # what a kernel pays that pads every row
    varies: bool
    by_noise: Array  # [T]
    by_class: Array  # [C]
    by_position: Array  # [N]


def analyse_amounts(trace: Trace) -> list[Amounts]:
    """One record per router, in order of depth; [] for a dense model."""
    routers = trace.routers
    labels = names(routers)
    return [_amounts(router, name) for router, name in zip(routers, labels)]


def _amounts(router: RouterTrace, name: str) -> Amounts:
    half = router.main
    choices, rows = router.choices[half], float(router.rows[half])
    used = np.flatnonzero(choices)
    return Amounts(
        place=router.place,
        name=name,
        mean=float(router.counts[half].sum() / rows) if rows else float("nan"),
        p95=formulas.quantile_of_histogram(choices, 0.95),
        most=int(used[-1]) if used.size else 0,
        varies=used.size > 1,
        by_noise=_per_row(router.noise, half),
        by_class=_per_row(router.classes, 0),
        by_position=_per_row(router.positions, half),
    )


def _per_row(table: Joint, half: int) -> Array:
    """[columns] choices per row; NaN where there are no rows, empty where nothing was recorded."""
    rows = table.rows[half]
    if not rows.any():
        return np.zeros(0)
    total = table.counts[half].sum(1)
    return np.divide(total, rows, out=np.full(len(rows), np.nan), where=rows > 0)
