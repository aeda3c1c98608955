"""Whether the dispatch of experts reaches its goals, from the rows of ``coterie bench experts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coterie.bench.goals import goal

LARGE = ("S2", "S2-b32", "B2", "fine64", "small")
FINE = ("fine64", "small")
_DENSE_BOUNDS = {"S2": (1.0, 1.05), "fine64": (1.15, 1.15), "small": (1.15, 1.15)}
_BOTH = (("", "forward"), ("train_", "forward and backward"))

Row = dict[str, Any]


def expert_goals(rows: Sequence[Row], threads: int, bandwidth: float) -> list[Row]:
    """Rows of the goals P1 to P6; on several threads P12 and the bounds against a dense layer too.

    ``bandwidth``: bytes that this machine reads per second on so many threads, for decoding.
    """
    own = {row["case"]: row for row in rows if row["backend"] == "auto"}
    made = [*_against_floor(own), *_against_peers(own), *_decoding(own, bandwidth)]
    if threads > 1:
        made += _on_threads(own)
    return made


def _against_floor(own: dict[str, Row]) -> list[Row]:
    made = []
    for prefix, name, bound in (("", "P1", 1.08), ("train_", "P4", 1.10)):
        for case in (c for c in LARGE if c in own):
            what = f"{case}: {dict(_BOTH)[prefix]}, over the bare experts"
            figure, spread = own[case][f"{prefix}vs_floor"], own[case][f"{prefix}spread"]
            made.append(goal(name, what, figure, bound, True, spread=spread))
    return made


def _against_peers(own: dict[str, Row]) -> list[Row]:
    made = []
    for case in (c for c in FINE if c in own):
        what = f"{case}: time of the faster grouped product over ours, forward"
        figure = own[case]["grouped_vs_auto"]
        made.append(goal("P2", what, figure, 1.3, False))
    for case, row in own.items():
        for prefix, passes in _BOTH:
            if row[f"{prefix}vs_peer"] is not None:
                what = f"{case}: {passes}, over the fastest peer"
                made.append(goal("P3", what, row[f"{prefix}vs_peer"], 1.05, True))
    if "fine64" in own:
        what = "fine64: time of the usual loop over ours, forward and backward"
        made.append(goal("P5", what, own["fine64"]["train_eager_vs_auto"], 3.0, False))
    return made


def _decoding(own: dict[str, Row], bandwidth: float) -> list[Row]:
    made = []
    for case in (c for c in own if "decode" in c):
        row = own[case]
        share = row["touched_bytes"] / (1e-3 * row["forward_ms"]) / bandwidth
        what = f"{case}: bytes of touched experts per second, of what the machine reads"
        made.append(goal("P6", what, share, 0.8, False))
        made.append(goal("P6", f"{case}: over the plain loop", row["vs_loop"], 1.0, True))
    return made


def _on_threads(own: dict[str, Row]) -> list[Row]:
    made = []
    for case in (c for c in ("S2", "fine64") if c in own):
        for prefix, passes in _BOTH:
            what = f"{case}: {passes}, one thread over all"
            made.append(goal("P12", what, own[case][f"{prefix}threads_gain"], 1.8, False))
    for name, bounds in _DENSE_BOUNDS.items():
        for (prefix, passes), bound in zip(_BOTH, bounds if name in own else ()):
            what = f"{name}: {passes}, over a dense layer of equal active cost"
            made.append(goal("threads", what, own[name][f"{prefix}vs_dense"], bound, True))
    return made
