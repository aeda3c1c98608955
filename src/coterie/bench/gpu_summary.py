"""From the files of the parts to one table and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.bench.expert_peers import DENSE_LAYER
from coterie.bench.gpu_peers import PEERS
from coterie.bench.gpu_speed import OURS

FINE_GAIN = 1.3  # over torch's grouped product, at the fine-grained size
_COLUMNS = ("forward_ms", "train_ms", "forward_vs_cublas", "train_vs_cublas", "forward_vs_dense",
            "train_vs_dense", "saved_mib", "peak_mib", "relative_error")  # fmt: skip


def verdict(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each size measured: our time against the best peer's (goal <= 1), against the grouped
    product's where experts are small (<= 1 / 1.3), and what is saved against a dense layer (<= 1).
    ``met`` is None where nobody was there to compare with."""
    made = []
    for name, result in parts.items():
        if not name.startswith("speed"):
            continue
        rows = {row["candidate"]: row for row in result["rows"]}
        own = rows.get(OURS)
        peers = [peer for peer in PEERS if peer in rows]
        for mode in ("forward", "train"):
            value = None if own is None else own[f"{mode}_vs_peer"]
            best = min(peers, key=lambda p: rows[p][f"{mode}_ms"], default=None)
            made.append(_goal(name, f"{mode} / best peer ({best})", value, 1.0))
            if name.startswith("speed-fine64"):
                value = None if own is None else own[f"{mode}_vs_grouped"]
                made.append(_goal(name, f"{mode} / grouped_mm", value, round(1 / FINE_GAIN, 3)))
        saved = [rows.get(who, {}).get("saved_mib") for who in (OURS, DENSE_LAYER)]
        share = round(saved[0] / saved[1], 3) if all(saved) else None
        made.append(_goal(name, "saved / dense layer", share, 1.0))
    return made


def _goal(part: str, what: str, value: float | None, limit: float) -> dict[str, Any]:
    met = None if value is None else value <= limit
    return {"part": part, "what": what, "value": value, "limit": limit, "met": met}


def markdown(parts: Mapping[str, Any], stamp: Mapping[str, Any]) -> str:
    """The page ``summary.md``."""
    lines = ["# Expert layers on a GPU", "", f"`{stamp['commit']}` on {stamp['hardware']}", ""]
    for name, result in parts.items():
        if name.startswith("speed"):
            lines += [f"## {name}", "", *_speed(result), ""]
        elif isinstance(result, list):
            lines += [f"## {name}", "", *_table(result), ""]
        else:
            lines += [f"## {name}", "", *_table([result]), ""]
    lines += ["## Goals", "", "Ratios of times and of memory; smaller is better.", ""]
    return "\n".join([*lines, *_table(verdict(parts)), ""])


def _speed(result: Mapping[str, Any]) -> list[str]:
    rows = [{key: row.get(key) for key in ("candidate", *_COLUMNS)} for row in result["rows"]]
    missing = [f"- left out: {name}: {why}" for name, why in result["missing"].items()]
    return [*_table(rows), "", *missing]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["(nothing measured)"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row.get(name)) for name in names] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
