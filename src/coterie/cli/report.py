"""``coterie report``: who does what in a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from coterie.cli.output import say, say_json


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [RUN/report]")
@click.option("--json", "as_json", is_flag=True, help="Print the report's numbers as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(run: Path, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Which experts answer in RUN, over layers, noise levels and classes: a page and its numbers.

    \b
      coterie report runs/dit-moe
    """
    from coterie.train.report import report_run

    page = report_run(run, out or run / "report", not quiet, citation_of(run))
    numbers = page.with_name("report.json")
    found = json.loads(numbers.read_text(encoding="utf-8"))
    if as_json:
        say_json(found)
        return
    for sentence in found.get("routing", {}).get("summary", ()):
        say(sentence)
    say(f"report   {page}")
    say(f"numbers  {numbers}")


def citation_of(run: Path) -> str:
    """BibTeX of the recipe a run was started from; empty for a run of one's own making."""
    from coterie.recipes import get_recipe, list_recipes

    try:
        name = json.loads((run / "config.json").read_text(encoding="utf-8")).get("recipe")
    except (OSError, ValueError, AttributeError):
        return ""  # whoever loads the run says what is wrong with it
    return get_recipe(name).paper.bibtex if name in list_recipes() else ""
