"""What every ``coterie bench`` command takes and gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from coterie.cli.output import OUT_FILE, say, say_json, table

LAWS = ("goal", "what", "figure", "bound", "met")
GOALS = (*LAWS, "spread", "ours_ms", "peer", "peer_ms")


def timing_options(rounds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--threads, --rounds (default ``rounds``), --out and --json (``as_json``)."""
    options = (
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True),
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True),
        click.option("--out", type=OUT_FILE, help="Also write the JSON here."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON, with every column."),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def show(
    result: dict[str, Any],
    columns: Sequence[str],
    out: Path | None,
    as_json: bool,
    tables: Sequence[tuple[str, Sequence[str]]] = (),
) -> None:
    """Write ``result`` to ``out``, print it, or the ``columns`` of its ``rows`` as a table.

    ``tables``: further lists of rows in it, each (key, columns), printed below.
    """
    from coterie.core.folder import write_text

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        say_json(result)
        return
    for key, shown in (("rows", columns), *tables):
        say(table(result[key], shown))
