"""The report as a terminal table."""

from __future__ import annotations

import numpy as np

from coterie.inspect.page.findings import findings, sentences
from coterie.inspect.statistics.formulas import Information
from coterie.inspect.statistics.routers import RouterStats, analyse
from coterie.inspect.statistics.trace import Trace

MARKS = {"alarm": "!!", "note": "--", "good": "ok"}


def text_summary(trace: Trace) -> str:
    """Plain text, at most about 100 columns: sentences, findings, one line per router."""
    routers = analyse(trace)
    lines = [*sentences(trace, routers)]
    lines += [f"{MARKS[finding.level]} {finding.text}" for finding in findings(routers)]
    if routers:
        lines += ["", *_table([_header(), *[_row(trace, item) for item in routers]]), "", *LEGEND]
    return "\n".join(lines)


LEGEND = (
    "max/mean, cv, load H: balance of the load (load H = entropy / log E, 1 = uniform).",
    "conf H: entropy of one row's probabilities / log E (0 = certain).  I(.): bits the expert",
    "tells, Miller-Madow corrected; <x: below x, which unrelated things also give.",
    "steady: overlap with the choices of the sampling step before, early / late.",
)


def _header() -> list[str]:
    head = ["layer", "E", "k", "rows", "max/mean", "cv", "load H", "conf H", "dead"]
    return [*head, "I(noise)", "I(class)", "I(pos)", "steady"]


def _row(trace: Trace, item: RouterStats) -> list[str]:
    bits = [item.information.get(facet) for facet in ("noise", "class", "position")]
    steps = trace.steps.get(item.place)
    early, late = steps.early_late() if steps else (np.nan, np.nan)
    return [
        item.name,
        str(item.num_experts),
        f"{item.choices_per_row:.3g}",
        f"{item.rows:,.0f}",
        f"{item.max_over_mean:.2f}",
        f"{item.cv:.2f}",
        f"{item.entropy:.2f}",
        _maybe(item.confidence),
        str(len(item.dead)) if item.enough else "?",
        *[_bits(info) for info in bits],
        "-" if np.isnan(early) else f"{early:.2f}/{late:.2f}",
    ]


def _bits(info: Information | None) -> str:
    if info is None:
        return "-"
    return f"{info.corrected:.3f}" if info.measurable else f"<{info.floor:.3f}"


def _maybe(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
