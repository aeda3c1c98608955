"""Measured claims as a Markdown table, and its place in a page.

The table stands between two marker lines, so that a page and the results cannot drift apart: a
test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coterie.core.errors import DataError, describe

BEGIN = "<!-- claims: written by `coterie verify --update` -->"
END = "<!-- end of claims -->"


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Every ``<recipe>.json`` of a folder, by name."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(describe("results", str(folder), "a folder with RECIPE.json files"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def claims_table(results: list[dict[str, Any]]) -> str:
    """One row per claim; what is not shown is in the table like everything else."""
    lines = [
        "| recipe | claim | metric | ours | baseline | spread | seeds | shown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines += [_row(result["recipe"], claim) for claim in result["claims"]]
    shown = sum(claim["shown"] for result in results for claim in result["claims"])
    total = sum(len(result["claims"]) for result in results)
    commits = sorted({str(result["commit"]) for result in results})
    machine = results[0]["hardware"]
    lines += [
        "",
        f"{shown} of {total} shown. {results[0]['rule'].capitalize()}; spread is that deviation. "
        f"Commit {', '.join(commits)}; {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; one thread per run.",
    ]
    return "\n".join(lines)


def _row(recipe: str, claim: dict[str, Any]) -> str:
    baseline = f"{claim['baseline']:.4g}"
    if claim["factor"] != 1:
        baseline = f"{claim['factor']:g} x {baseline}"
    verdict = "yes" if claim["shown"] else "**not shown**"
    arrow = "lower" if claim["better"] == "lower" else "higher"
    metric, against = claim["metric"], claim.get("against", claim["metric"])
    if against != metric:
        metric = f"{metric} against {against}"
    return (
        f"| {recipe} | {claim['claim']} | {metric} ({arrow} is better) "
        f"| {claim['ours']:.4g} | {baseline} | {claim['spread']:.2g} | {claim['seeds']} "
        f"| {verdict} |"
    )


def update_page(page: str | Path, table: str) -> None:
    """Put ``table`` between the markers of ``page``."""
    from coterie.core.folder import write_text

    path = Path(page)
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataError(f"{page}: needs the lines {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    write_text(path, f"{before}{BEGIN}\n{table}\n{END}{after}")
