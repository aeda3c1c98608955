"""Goals of speed and what was measured, from the files of ``coterie bench``: as Markdown tables.

A file of results has ``threads``, ``goals`` and perhaps ``laws``; rows of the same goal from runs
on one and on several threads stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.core.errors import DataError, describe
from coterie.core.json_reader import read_object

TITLES = {
    "P1": "experts, forward: time over the bare products on sorted rows",
    "P2": "fine-grained and small experts, forward: times as fast as grouped products",
    "P3": "experts, forward and training: time over the fastest peer of each size",
    "P4": "experts, training: time over the bare products on sorted rows",
    "P5": "64 experts, training: times as fast as the usual loop over experts",
    "P6": "decoding: share of the machine's read bandwidth; time over the plain loop",
    "P7": "small network, guided: times as fast as diffusers; ms of a solver's step",
    "P8": "DiT-S/2, guided: time over diffusers, over its products and attention alone",
    "P9": "three references: times as fast with their keys and values kept, same bits",
    "P10": "router folded by step: time over a dense layer; times as fast as routed",
    "P12": "experts: times as fast on two threads as on one",
}
"""What each goal is about, in the order of the table; others follow by name."""
HEADLINES = (
    (
        ("P3", "over the fastest peer"),
        "Expert layers, forward and training, take {} times as long as the fastest of three peers: "
        "a plain loop, transformers' experts, torch's grouped product",
    ),
    (
        ("P7", "tiny, 20 guided steps: diffusers / exact caches"),
        "Sampling a small network with guidance is {} times as fast as in diffusers",
    ),
    (
        ("P8", "coterie / diffusers"),
        "Sampling DiT-S/2 with guidance takes {} times as long as in diffusers",
    ),
    (
        ("parallel", "over DistributedDataParallel"),
        "A training step in two processes takes {} times as long as with DistributedDataParallel",
    ),
)
"""(goal, part of what was measured) and a sentence for the range of its figures."""
HEAD = "| goal | what | bound |"
_COLUMNS = " {n} ± spread | ms, ours / peer |"

Row = dict[str, Any]
Key = tuple[str, str, str]


def sections(folder: str | Path) -> dict[str, str]:
    """Tables and headlines of the results in a folder, by the name of their place in a page."""
    results = read_goals(folder)
    return {
        "goals": goals_table(results),
        "goals in short": short_table(results),
        "speed": headlines(results),
    }


def read_goals(folder: str | Path) -> list[Row]:
    """Every file of results with goals, by name."""
    files = [read_object(path) for path in sorted(Path(folder).glob("*.json"))]
    results = [found for found in files if "goals" in found and "threads" in found]
    if not results:
        raise DataError(describe("results", str(folder), "a folder with files of coterie bench"))
    return results


def _by_goal(results: Sequence[Row]) -> tuple[dict[Key, dict[int, Row]], list[int]]:
    """(goal, what, bound) -> number of threads -> row, in the order of ``TITLES``; the numbers."""
    found: dict[Key, dict[int, Row]] = {}
    for result in results:
        for row in (*result["goals"], *result.get("laws", ())):
            key = (row["goal"], row["what"], row["bound"])
            found.setdefault(key, {})[result["threads"]] = row
    order = {name: place for place, name in enumerate(TITLES)}
    keys = sorted(found, key=lambda key: order.get(key[0], len(order)))
    return {key: found[key] for key in keys}, sorted({result["threads"] for result in results})


def goals_table(results: Sequence[Row]) -> str:
    """One row per goal and size: figure, spread, milliseconds of both; misses in bold."""
    rows, threads = _by_goal(results)
    lines = [HEAD + "".join(_COLUMNS.format(n=_threads(n)) for n in threads)]
    lines.append("|---" * (3 + 2 * len(threads)) + "|")
    for (name, what, bound), by_threads in rows.items():
        cells = [cell for n in threads for cell in _cells(by_threads.get(n))]
        lines.append(f"| {name} | {what} | {bound} | {' | '.join(cells)} |")
    machine = results[0]["hardware"]
    commits = ", ".join(sorted({str(result["commit"]) for result in results}))
    lines += [
        "",
        f"{_met(rows)} met, misses in bold. "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; commit {commits}.",
    ]
    return "\n".join(lines)


def short_table(results: Sequence[Row]) -> str:
    """One row per goal of ``TITLES``: how many of its figures are met, and the misses."""
    rows, _ = _by_goal(results)
    lines = ["| goal | | met | missed |", "|---|---|---|---|"]
    for name, title in TITLES.items():
        found = [
            (row, f"{what}, {_threads(n)}: {row['figure']:g} ({bound})")
            for (goal, what, bound), by_threads in rows.items()
            for n, row in by_threads.items()
            if goal == name and row["met"] is not None
        ]
        missed = "; ".join(text for row, text in found if not row["met"])
        met = f"{sum(row['met'] for row, _ in found)} of {len(found)}"
        lines.append(f"| {name} | {title} | {met} | {missed} |")
    return "\n".join(lines)


def headlines(results: Sequence[Row]) -> str:
    """A list item for each of ``HEADLINES``, over all sizes and numbers of threads, and one that
    counts what was met."""
    rows, _ = _by_goal(results)
    lines = []
    for (name, part), sentence in HEADLINES:
        found = [
            row
            for (goal, what, _), by_threads in rows.items()
            for row in by_threads.values()
            if goal == name and part in what and row["figure"] is not None
        ]
        if not found:
            continue
        low, high = (f"{end(row['figure'] for row in found):.2f}" for end in (min, max))
        missed = sorted({row["bound"] for row in found if not row["met"]})
        note = f" (missed: the goal is {', '.join(missed)})" if missed else ""
        lines.append(f"- {sentence.format(low if low == high else f'{low} to {high}')}{note}.")
    return "\n".join([*lines, f"- {_met(rows)} goals, all set beforehand, are met."])


def _met(rows: dict[Key, dict[int, Row]]) -> str:
    judged = [row for found in rows.values() for row in found.values() if row["met"] is not None]
    return f"{sum(row['met'] for row in judged)} of {len(judged)}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _cells(row: Row | None) -> tuple[str, str]:
    if row is None or row["figure"] is None:
        return "", ""
    figure = f"{row['figure']:g}"
    figure = figure if row["met"] else f"**{figure}**"
    spread = row.get("spread")
    figure = figure if spread is None else f"{figure} ± {spread:.2g}"
    if row.get("peer") is None:
        return figure, ""
    return figure, f"{row['ours_ms']:.4g} / {row['peer_ms']:.4g} {row['peer']}"
