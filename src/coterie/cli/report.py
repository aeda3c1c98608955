"""``coterie report``: who does what in a run, or in a Hugging Face model that reads a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.model_folder import given_of, is_model, load, prepare, reads_text
from coterie.cli.output import OUT, facts, note, progress_bar, say, say_json, threads_option
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.json_reader import read_object


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=candidates.runs)
@click.option("--out", type=OUT, help="Folder. [RUN/report]")
@reads_text()
@click.option("-n", "--dry-run", is_flag=True, help="A model: sizes and projected minutes only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report's numbers as JSON.")
@threads_option()
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    run: Path, out: Path | None, dry_run: bool, as_json: bool, quiet: bool, **reading: Any
) -> None:
    """Show which experts serve which noise levels, classes and places: a page and its numbers.

    RUN is a run directory, or the folder of a Hugging Face MoE model, which reads --text:

    \b
      coterie report runs/dit-moe
      coterie report models/olmoe --text book.txt --tokens 20000
    """
    given = given_of(reading, run, {"tokens_read": "tokens"})
    if is_model(run):
        _report_model(run, out or run / "report", given, dry_run, as_json, quiet)
        return
    if dry_run:
        raise ConfigError(f"--dry-run: only for the folder of a Hugging Face model, not {run}")
    from coterie.runs.measure.report import report_run

    _say_report(report_run(run, out or run / "report", not quiet, citation_of(run)), as_json)


def _report_model(
    folder: Path, out: Path, given: dict[str, Any], dry_run: bool, as_json: bool, quiet: bool
) -> None:
    from coterie.inspect import report_outputs, write_report

    reading = prepare(folder, given)
    if dry_run:
        planned = reading.measure()
        say_json(planned) if as_json else say(facts(planned))
        return
    report_outputs(out)
    load(reading, quiet)
    with progress_bar(len(reading.windows), "windows", quiet) as advance:
        data = reading.read(advance)
    if not quiet:
        note("drawing the page")
    page = write_report(out, data)
    if not as_json:
        say(facts(_values(data.metrics)))
    _say_report(page, as_json)


def _values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Losses without their standard errors, nested as they are."""
    return {
        name: entry.get("value", _values(entry)) if isinstance(entry, Mapping) else entry
        for name, entry in metrics.items()
    }


def _say_report(page: Path, as_json: bool) -> None:
    numbers = page.with_name("report.json")
    found = read_object(numbers)
    if as_json:
        say_json(found)
        return
    composed, routing = found.get("composition") or {}, found.get("routing", {})
    for part in (composed, routing if routing.get("routers") or not composed else {}):
        for sentence in part.get("summary", ()):
            say(sentence)
    say(f"report   {page}")
    say(f"numbers  {numbers}")


def citation_of(run: Path) -> str:
    """BibTeX of the recipe a run was started from; empty for a run of one's own making."""
    from coterie.recipes import get_recipe, list_recipes

    try:
        name = read_object(run / "config.json").get("recipe")
    except CheckpointError:
        return ""  # whoever loads the run says what is wrong with it
    return get_recipe(name).paper.bibtex if name in list_recipes() else ""
