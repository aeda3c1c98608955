"""``coterie bench``: how fast things run here, beside their peers."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.output import say, say_json, table

SHOWN = ("case", "backend", "forward_ms", "vs_dense", "train_ms", "train_vs_dense", "train_vs_best")


@click.group("bench")
def command() -> None:
    """Time parts of the library on this machine."""


@command.command("experts")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every column.")
def experts(
    cases: tuple[str, ...], threads: int, rounds: int, out: Path | None, as_json: bool
) -> None:
    """Time every way to dispatch tokens to experts. Without CASE: all sizes, some minutes.

    vs_dense: time over that of a dense layer of equal active cost; train: forward and backward;
    vs_best: time over that of the fastest other way. `auto` is what a model uses by default.
    """
    import json

    from coterie.core.folder import write_text
    from coterie.core.machine import commit, hardware
    from coterie.experts.benchmark import CASES, run_benchmark

    rows = run_benchmark(cases or tuple(CASES), threads=threads, rounds=rounds)
    result = {
        "bench": "experts",
        "commit": commit(),
        "hardware": hardware(),
        "threads": threads,
        "rounds": rounds,
        "dtype": "float32",
        "rows": rows,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        say_json(result)
        return
    say(table(rows, SHOWN))
