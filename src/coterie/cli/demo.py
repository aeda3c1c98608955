"""``coterie demo``: from nothing to trained experts, samples and a report."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.output import OUT, progress_bar, say, threads_option
from coterie.cli.overrides import PathsCommand, apply, split, takes_paths

RECIPE = "dit-moe"
DATA = "mnist-5k"
NUM = 100


@click.command("demo", cls=PathsCommand)
@takes_paths("[--PATH=VALUE]...")
@click.option(
    "--out", type=OUT, default=Path("runs/demo"), show_default=True, help="Run directory."
)
@threads_option()
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...], out: Path, quiet: bool) -> None:
    """Train a small mixture of experts on handwritten digits, draw samples, report who does what.

    Takes minutes on two processor cores. The same command again resumes, or only draws again.
    """
    words, paths = split(arguments)
    if words:
        raise click.UsageError(f"unexpected: {' '.join(words)}")
    from coterie.data.download.fetch import fetch
    from coterie.recipes import get_recipe
    from coterie.runs.measure.report import report_run
    from coterie.runs.sample.sample_files import sample_run
    from coterie.runs.trained_run import load_run
    from coterie.runs.training import start

    recipe = get_recipe(RECIPE)
    config = apply(ctx, recipe.config("demo"), paths)
    fetch(DATA)
    run = start(config, out, progress=not quiet)
    with progress_bar(NUM, "sampling", quiet) as advance:
        shown = sample_run(load_run(run), num=NUM, out=run / "samples", progress=advance)
    page = report_run(run, run / "report", not quiet, recipe.paper.bibtex)
    say(f"samples  {shown}")
    say(f"report   {page}")
    say(f"numbers  {page.with_name('report.json')}")
