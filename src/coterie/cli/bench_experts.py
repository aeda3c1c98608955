"""``coterie bench experts``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import show, timing_options

SHOWN = ("case", "backend", "forward_ms", "vs_dense", "train_ms", "train_vs_dense", "train_vs_best")


@click.command("experts")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@timing_options(rounds=3)
def command(
    cases: tuple[str, ...], threads: int, rounds: int, out: Path | None, as_json: bool
) -> None:
    """Time every way to dispatch tokens to experts. Without CASE: all sizes, some minutes.

    vs_dense: time over that of a dense layer of equal active cost; train: forward and backward;
    vs_best: time over that of the fastest other way. `auto` is what a model uses by default.
    """
    from coterie.bench.experts import CASES, run_benchmark
    from coterie.bench.timing import Place, stamp

    rows = run_benchmark(cases or tuple(CASES), threads=threads, rounds=rounds)
    result = {**stamp("experts", Place(threads=threads), rounds), "rows": rows}
    show(result, SHOWN, out, as_json)
