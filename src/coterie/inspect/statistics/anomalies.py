"""Three anomalies of mixtures of experts as numbers (HoME, arXiv:2408.05430).

*Collapse*: experts' outputs have different scales, or are mostly zero, so that gates cannot compare
them. *Degradation*: an expert meant for several tasks serves one. *Underfitting*: a task does not
use its own experts, or rare cases have a larger loss than frequent ones. In a model without tasks,
classes take their place, then noise levels, then positions.

Shapes: E experts, C columns (tasks, classes, noise bins or groups of positions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.inspect.phrases import label_name, noise_name
from coterie.inspect.statistics.accumulators import Place, RouterTrace
from coterie.inspect.statistics.formulas import Array
from coterie.inspect.statistics.routers import RouterStats, facet_table
from coterie.inspect.statistics.trace import Trace

FACETS = ("task", "class", "noise", "position")
"""What may be set against the experts, the first of which there is data."""
ENOUGH_ROWS = 20.0
"""Rows of a column, and choices of an expert, below which neither is judged."""
GROUPS = 10
"""Positions are put together to about so many columns."""
RARE = 0.5
"""A column is rare if it is less often than this share of the mean."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Statistics of each expert's outputs, over rows and units; [E] each, NaN for experts without
    rows."""

    mean: Array  # of the outputs
    std: Array  # of the outputs
    zeros: Array  # share of zeros among inner units or outputs, whichever is larger
    rows: Array

    @property
    def scale(self) -> Array:
        """[E] root mean square of the outputs."""
        scale: Array = np.sqrt(self.mean**2 + self.std**2)
        return scale


@dataclass(frozen=True, eq=False)
class Collapse:
    """Different output scales in one layer."""

    place: Place
    name: str
    answers: Answers
    ratio: float  # largest over smallest scale; ideal 1, inf if an expert's output is 0
    strongest: int
    weakest: int
    zeros: float  # largest share of zeros
    emptiest: int


@dataclass(frozen=True, eq=False)
class Degradation:
    """How much each expert serves a single column."""

    place: Place
    name: str
    unit: str
    facet: str
    columns: tuple[str, ...]
    table: Array  # [C, E], share of the expert's gate weight per column, at equal column frequency
    top: Array  # [E], largest share
    ideal: Array  # [E], 1 over the number of columns that may use the expert
    worst: int | None  # the expert with the largest share, among those of several columns
    expert_names: tuple[str, ...] = ()
    unused: tuple[int, ...] = ()  # experts without rows, where that is a fault

    @property
    def number(self) -> float:
        return math.nan if self.worst is None else float(self.top[self.worst])

    @property
    def column(self) -> str:
        """The column that the worst expert serves."""
        return (
            "" if self.worst is None else self.columns[int(np.nanargmax(self.table[:, self.worst]))]
        )


@dataclass(frozen=True, eq=False)
class Private:
    """Gate weight of a task that goes to its own experts, in one layer."""

    place: Place
    name: str
    task: str
    share: float
    ideal: float  # share of the task's candidates that are its own
    frequency: float  # share of the rows

    @property
    def number(self) -> float:
        """Gate weight of own experts relative to their share among candidates: 1 ideal, 0
        unused."""
        return self.share / self.ideal


@dataclass(frozen=True, eq=False)
class Underfitting:
    """Frequency, held-out loss (NaN: unknown) and gate weight per row of the columns of one facet.

    ``number``: loss of the rare columns over that of the others, where there are rare ones and
    losses; else the least gate weight of a column. 1 is ideal.
    """

    facet: str
    columns: tuple[str, ...]
    frequency: Array
    loss: Array
    weight: Array
    private: tuple[Private, ...]

    @property
    def rare(self) -> NDArray[np.bool_]:
        """[C]"""
        rare: NDArray[np.bool_] = self.frequency < RARE * self.frequency.mean()
        return rare

    @property
    def loss_ratio(self) -> float:
        """Mean loss of rare columns over that of the others; NaN without either."""
        known = np.isfinite(self.loss)
        rare, rest = self.loss[known & self.rare], self.loss[known & ~self.rare]
        if not len(rare) or not len(rest) or rest.mean() <= 0:
            return math.nan
        return float(rare.mean() / rest.mean())

    @property
    def least(self) -> int:
        """The column with the least gate weight per row."""
        return int(np.argmin(self.weight))

    @property
    def number(self) -> float:
        ratio = self.loss_ratio
        return float(self.weight[self.least]) if math.isnan(ratio) else ratio


@dataclass(frozen=True, eq=False)
class Anomalies:
    """The three anomalies over all routers; ``routed`` False: a dense model."""

    routed: bool = False
    collapse: tuple[Collapse, ...] = ()
    degradation: tuple[Degradation, ...] = ()
    underfitting: Underfitting | None = None


def analyse_anomalies(
    trace: Trace,
    items: Sequence[RouterStats],
    answers: Mapping[Place, Answers],
    names: Mapping[str, Sequence[str]],
    losses: Mapping[str, Mapping[str, float]],
) -> Anomalies:
    """``names``: of the columns of a facet; ``losses``: facet -> name of a column -> held-out loss.
    Nothing for a dense model."""
    routers = [(r, i) for r, i in zip(trace.routers, items) if r.num_experts > 1]
    facets = [f for f in FACETS if any(_judged(_Columns(r, f)) for r, _ in routers)]
    told = _most_told(facets, [item for _, item in routers])
    rare = facets[0] if facets else ""
    return Anomalies(
        bool(routers),
        tuple(_collapse(item, answers[item.place]) for _, item in routers if item.place in answers),
        tuple(
            found
            for router, item in routers
            if told and (found := _degradation(router, item, told, names.get(told, ())))
        ),
        _underfitting(routers, rare, names.get(rare, ()), losses.get(rare, {})),
    )


def _most_told(facets: Sequence[str], items: Sequence[RouterStats]) -> str:
    """For what experts may be one-sided: tasks, else class or noise level, whichever the choice of
    expert tells more about, else positions; "" without any."""
    if not {"class", "noise"} <= set(facets) or facets[0] == "task":
        return facets[0] if facets else ""

    def share(facet: str) -> float:
        found = [i.information[facet].normalised for i in items if facet in i.information]
        return float(np.mean(found)) if found else 0.0

    return max(("class", "noise"), key=share)


class _Columns:
    """A facet's table over the rows that statistics describe; positions in groups."""

    def __init__(self, router: RouterTrace, facet: str) -> None:
        table, half = facet_table(router, facet), router.main
        labelled = facet != "class" or half == 0
        self.rows = table.rows[half] if labelled else table.rows[half][:0]
        self.gates, self.counts = table.gates[half][: len(self.rows)], table.counts[half]
        self.open = table.open[half][: len(self.rows)]
        self.starts = np.arange(len(self.rows))
        if facet == "position" and len(self.rows) > GROUPS:
            self.starts = np.unique(np.linspace(0, len(self.rows), GROUPS + 1).astype(int)[:-1])
            self.rows = np.add.reduceat(self.rows, self.starts)
            self.gates = np.add.reduceat(self.gates, self.starts)
            self.open = np.logical_or.reduceat(self.open, self.starts)
        self.known = np.flatnonzero(self.rows >= ENOUGH_ROWS)


def _judged(columns: _Columns) -> bool:
    return len(columns.known) > 1


def _names(columns: _Columns, router: RouterTrace, facet: str, given: Sequence[str]) -> list[str]:
    if facet == "noise":
        bins = router.noise_bins
        return [noise_name(i / bins, (i + 1) / bins) for i in range(bins)]
    if facet == "position":
        return [f"from {start}" for start in columns.starts]
    return [label_name(i, given) for i in range(len(columns.rows))]


def _collapse(item: RouterStats, answers: Answers) -> Collapse:
    known = answers.rows > 0
    scale = np.where(known, answers.scale, np.nan)
    zeros = np.where(known, answers.zeros, np.nan)
    if not known.any():
        return Collapse(item.place, item.name, answers, math.nan, 0, 0, math.nan, 0)
    strongest, weakest = int(np.nanargmax(scale)), int(np.nanargmin(scale))
    low, high = float(scale[weakest]), float(scale[strongest])
    ratio = high / low if low > 0 else (math.inf if high > 0 else 1.0)
    emptiest = int(np.nanargmax(zeros))
    return Collapse(
        item.place, item.name, answers, ratio, strongest, weakest, float(zeros[emptiest]), emptiest
    )


def _degradation(
    router: RouterTrace, item: RouterStats, facet: str, given: Sequence[str]
) -> Degradation | None:
    columns = _Columns(router, facet)
    if not _judged(columns):
        return None
    known = columns.known
    rate = columns.gates[known] / columns.rows[known, None]  # gate weight of a row
    total = rate.sum(0)
    used = router.counts[router.main] >= ENOUGH_ROWS * len(known)
    used &= total > 0.01 * total.mean()
    table = np.divide(rate, total, out=np.full_like(rate, np.nan), where=used[None] & (total > 0))
    reach = columns.open[known].sum(0)
    top = np.where(used, np.nan_to_num(table).max(0), np.nan)
    shared = used & (reach > 1)
    worst = int(np.argmax(np.where(shared, top, -1.0))) if shared.any() else None
    names = _names(columns, router, facet, given)
    return Degradation(
        item.place,
        item.name,
        item.unit,
        facet,
        tuple(names[i] for i in known),
        table,
        top,
        1.0 / np.maximum(reach, 1),
        worst,
        item.expert_names,
        item.dead if item.enough and item.missed else (),
    )


def _underfitting(
    routers: Sequence[tuple[RouterTrace, RouterStats]],
    facet: str,
    given: Sequence[str],
    losses: Mapping[str, float],
) -> Underfitting | None:
    tables = [(r, i, c) for r, i in routers if facet and _judged(c := _Columns(r, facet))]
    if not tables:
        return None
    first, _, columns = tables[0]
    same = [c for _, _, c in tables if np.array_equal(c.known, columns.known)]
    known = columns.known
    per_row = np.array([c.gates[known].sum(1) / c.rows[known] for c in same])
    mean = np.array([c.gates[known].sum() / c.rows[known].sum() for c in same])
    weight = np.divide(per_row, mean[:, None], out=np.ones_like(per_row), where=mean[:, None] > 0)
    names = [_names(columns, first, facet, given)[i] for i in known]
    return Underfitting(
        facet,
        tuple(names),
        columns.rows[known] / columns.rows[known].sum(),
        np.array([losses.get(name, math.nan) for name in names]),
        weight.mean(0),
        tuple(p for r, i, c in tables if facet == "task" for p in _private(r, i, c, given)),
    )


def _private(
    router: RouterTrace, item: RouterStats, columns: _Columns, given: Sequence[str]
) -> list[Private]:
    """Tasks with experts that no other task may use, and others beside them."""
    names = _names(columns, router, "task", given)
    own = columns.open & (columns.open.sum(0) == 1)
    out = []
    for task in columns.known:
        candidates, mass = columns.open[task].sum(), columns.gates[task].sum()
        if own[task].any() and own[task].sum() < candidates and mass > 0:
            out.append(
                Private(
                    item.place,
                    item.name,
                    names[task],
                    float(columns.gates[task, own[task]].sum() / mass),
                    float(own[task].sum() / candidates),
                    float(columns.rows[task] / columns.rows.sum()),
                )
            )
    return out


def anomaly_numbers(found: Anomalies) -> dict[str, Any]:
    """For ``report.json``: every number of the three meters."""
    under = found.underfitting
    return {
        "collapse": [
            {
                **{k: v for k, v in vars(item).items() if k != "answers"},
                "place": item.place._asdict(),
                **vars(item.answers),
                "scale": item.answers.scale,
            }
            for item in found.collapse
        ],
        "degradation": [
            {**vars(item), "place": item.place._asdict(), "number": item.number}
            for item in found.degradation
        ],
        "underfitting": None
        if under is None
        else {
            **vars(under),
            "private": [
                {**vars(p), "place": p.place._asdict(), "number": p.number} for p in under.private
            ],
            "rare": under.rare.tolist(),
            "loss_ratio": under.loss_ratio,
            "number": under.number,
        },
    }
