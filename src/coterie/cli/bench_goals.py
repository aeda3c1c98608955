"""``coterie bench goals``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.output import say


@click.command("goals")
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("results/bench"),
    show_default=True,
    help="Folder of files that the other benchmarks wrote with --out.",
)
@click.option(
    "--update",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Write them into the marked places of this page instead.",
)
def command(results: Path, update: Path | None) -> None:
    """Print the goals of speed beside what was measured.

    Times nothing: reads what `coterie bench experts|sampling|cache ... --out FILE` left.
    """
    from coterie.bench.summary import sections
    from coterie.core.sections import update_sections

    tables = sections(results)
    if update is None:
        say(tables["goals"])
    else:
        update_sections(update, tables)
