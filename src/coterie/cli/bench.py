"""``coterie bench``: how fast the expert layers run here."""

from __future__ import annotations

import click

from coterie.cli.output import say, say_json, table


@click.command("bench")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Time the backends of the expert layer against a dense layer of equal active size."""
    from coterie.experts.benchmark import run_benchmark

    rows = run_benchmark()
    say_json(rows) if as_json else say(table(rows))
