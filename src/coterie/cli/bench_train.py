"""``coterie bench train``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, LAWS, show, timing_options
from coterie.cli.output import note

SHOWN = (
    *("candidate", "step_ms", "tokens_per_second", "vs_dense", "spread", "data_share"),
    "parameters",
)
MEMORY = ("candidate", "measured_bytes", "counted_bytes", "counted_over_measured")


@click.command("train")
@timing_options(rounds=9)
@click.option(
    "--beside",
    type=click.IntRange(1, 64),
    help="Instead: training alone and beside so many busy processes, threads chosen and fixed.",
)
def command(threads: int, rounds: int, out: Path | None, as_json: bool, beside: int | None) -> None:
    """Time training steps of `dit-moe` tiny, beside a dense model and transformers' experts.

    vs_dense: time over that of a dense model of equal active parameters; data_share: of a step
    that is spent getting samples. Memory: peak of a step, measured, and counted from shapes.
    """
    from coterie.bench.timing import Place, stamp
    from coterie.bench.train import run_benchmark

    if beside is not None:
        from coterie.bench.train_beside import run_beside

        found = run_beside(beside, rounds)
        result = {**stamp("train-beside", Place(), rounds), **found}
        show(result, ("threads", "alone", "beside"), out, as_json, [("goals", LAWS)])
        return
    found = run_benchmark(rounds=rounds, threads=threads)
    result = {**stamp("train", Place(threads=threads), rounds, ("transformers",)), **found}
    show(result, SHOWN, out, as_json, [("goals", GOALS), ("memory", MEMORY)])
    for package in found["left_out"]:
        note(f"note: {package} is not installed; its rows are left out")
