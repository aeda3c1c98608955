"""Measured claims as Markdown: every claim, one row per recipe, one sentence for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.core.errors import DataError, describe
from coterie.core.json_reader import read_object
from coterie.recipes.base import Claim, get_recipe, list_recipes


def sections(folder: str | Path) -> dict[str, str]:
    """Tables and headline of the results in a folder, by the name of their place in a page."""
    results = read_results(folder)
    return {
        "claims": claims_table(results),
        "recipes' claims": recipes_table(results),
        "claims in short": headline(results),
    }


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Every ``<recipe>.json`` of a folder, by name."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(describe("results", str(folder), "a folder with RECIPE.json files"))
    return [read_object(path, error=DataError) for path in paths]


def claims_table(results: list[dict[str, Any]]) -> str:
    """One row per claim; what is not shown, or not yet measured, is in the table like everything
    else."""
    lines = [
        "| recipe | claim | metric | ours | baseline | spread | seeds | shown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines += [_row(result["recipe"], claim) for claim in result["claims"]]
        lines += [
            f"| {result['recipe']} | {claim.claim} | {claim.metric} ({claim.better} is better) "
            "| | | | | not yet measured |"
            for claim in unmeasured(result)
        ]
    commits = sorted({str(result["commit"]) for result in results})
    machine = results[0]["hardware"]
    lines += [
        "",
        f"{_count(results)}. {results[0]['rule'].capitalize()}; spread is that deviation. "
        f"Commit {', '.join(commits)}; {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; one thread per run.",
    ]
    return "\n".join(lines)


def unmeasured(result: dict[str, Any]) -> list[Claim]:
    """Claims that the recipe has made since it was measured."""
    if result["recipe"] not in list_recipes():
        return []
    known = {claim["claim"] for claim in result["claims"]}
    return [claim for claim in get_recipe(result["recipe"]).claims if claim.claim not in known]


def recipes_table(results: list[dict[str, Any]]) -> str:
    """One row per recipe: how many claims show, and the first that its paper makes."""
    lines = ["| recipe | shown | first claim | metric | ours | baseline | |"]
    lines.append("|---" * 7 + "|")
    for result in results:
        first = result["claims"][0]
        shown = _count([result]).removesuffix(" shown")
        verdict = "shown" if first["shown"] else "**not shown**"
        figures = f"{first['metric']} | {first['ours']:.4g} | {_baseline(first)}"
        lines.append(f"| {result['recipe']} | {shown} | {first['claim']} | {figures} | {verdict} |")
    return "\n".join([*lines, "", f"In all {_count(results)}."])


def headline(results: list[dict[str, Any]]) -> str:
    """A list item that counts what is shown and what is not."""
    claims = [claim for result in results for claim in result["claims"]]
    shown = sum(claim["shown"] for claim in claims)
    return (
        f"- Of {len(claims)} claims of {len(results)} recipes {shown} are shown and "
        f"{len(claims) - shown} are not."
    )


def _count(results: list[dict[str, Any]]) -> str:
    claims = [claim for result in results for claim in result["claims"]]
    return f"{sum(claim['shown'] for claim in claims)} of {len(claims)} shown"


def _baseline(claim: dict[str, Any]) -> str:
    plain = f"{claim['baseline']:.4g}"
    return plain if claim["factor"] == 1 else f"{claim['factor']:g} x {plain}"


def _row(recipe: str, claim: dict[str, Any]) -> str:
    verdict = "yes" if claim["shown"] else "**not shown**"
    arrow = "lower" if claim["better"] == "lower" else "higher"
    metric, against = claim["metric"], claim.get("against", claim["metric"])
    if against != metric:
        metric = f"{metric} against {against}"
    return (
        f"| {recipe} | {claim['claim']} | {metric} ({arrow} is better) "
        f"| {claim['ours']:.4g} | {_baseline(claim)} | {claim['spread']:.2g} | {claim['seeds']} "
        f"| {verdict} |"
    )
