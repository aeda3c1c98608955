"""``coterie bench``: how fast the expert layers run here."""

from __future__ import annotations

import click

from coterie.cli.output import say, say_json, table

SHOWN = ("case", "backend", "forward_ms", "vs_dense", "train_ms", "train_vs_dense", "train_vs_best")


@click.command("bench")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every column.")
def command(cases: tuple[str, ...], threads: int, rounds: int, as_json: bool) -> None:
    """Time every way to dispatch tokens to experts. Without CASE: all sizes, some minutes.

    vs_dense: time over that of a dense layer of equal active cost; train: forward and backward;
    vs_best: time over that of the fastest other way. `auto` is what a model uses by default.
    """
    from coterie.experts.benchmark import CASES, run_benchmark

    rows = run_benchmark(cases or tuple(CASES), threads=threads, rounds=rounds)
    if as_json:
        say_json(rows)
        return
    say(table(rows, SHOWN))
