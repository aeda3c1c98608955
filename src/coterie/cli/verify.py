"""``coterie verify``: the claims of recipes, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, OUT_NAME, progress_bar, say, say_json, table


@click.command("verify")
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=candidates.recipes)
@click.option(
    "--out",
    type=OUT_NAME,
    default=Path("results/claims"),
    show_default=True,
    help="Folder of the results, one RECIPE.json each.",
)
@click.option(
    "--work",
    type=OUT,
    default=Path("runs/verify"),
    show_default=True,
    help="Folder of the training runs; what is finished there is not repeated.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each model."
)
@click.option("--workers", type=click.IntRange(1), help="Processes at a time. [one per core]")
@click.option(
    "--update",
    type=click.Path(path_type=Path, exists=True),
    help="Measure nothing: write the results in --out into the marked places of this page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    recipes: tuple[str, ...],
    out: Path,
    work: Path,
    seeds: int,
    workers: int | None,
    update: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what the papers of recipes claim, at small scale and equal budget. No RECIPE: all.

    A claim that does not show is reported as not shown; that is a result, not an error.
    """
    from coterie.core.folder import write_text
    from coterie.core.outputs import writable
    from coterie.recipes import get_recipe, list_recipes

    if update is not None:
        from coterie.core.sections import update_sections
        from coterie.recipes.tables import sections

        update_sections(update, sections(out))
        return
    writable(out)
    names = list(recipes) or list_recipes()
    for name in names:
        get_recipe(name)  # a misspelt name should not cost the hours of those before it
    results: dict[str, Any] = {}
    for name in names:
        results[name] = _measure(name, work, seeds, workers, quiet)
        path = out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results[name], indent=2) + "\n")
        if not as_json:
            say(f"{name}  ({path})")
            say(verdicts(results[name]["claims"]) + "\n")
    if as_json:
        say_json(results[names[0]] if len(names) == 1 else results)


def _measure(name: str, work: Path, seeds: int, workers: int | None, quiet: bool) -> dict[str, Any]:
    from coterie.recipes import get_recipe
    from coterie.recipes.verify import verify

    total = len(get_recipe(name).arms()) * seeds
    with progress_bar(total, f"verify {name}", quiet) as advance:
        return verify(name, work, seeds, workers, progress=lambda *_: advance(1))


def verdicts(claims: list[dict[str, Any]]) -> str:
    """The claims of one recipe as a table, numbers before words."""
    columns = ("shown", "metric", "ours", "baseline", "spread", "seeds", "claim")
    return table([{name: claim[name] for name in columns} for claim in claims])
