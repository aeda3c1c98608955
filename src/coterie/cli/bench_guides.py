"""``coterie bench guides``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import show, timing_options

SHOWN = ("candidate", "ms", "over_plain")
FOLLOWED = (
    "task",
    "guide",
    "scale",
    "label_accuracy",
    "target_error",
    "target_accuracy",
    "frechet",
)


@click.command("guides")
@timing_options(rounds=5)
@click.option("--quick", is_flag=True, help="Times only: nothing is trained.")
def command(threads: int, rounds: int, out: Path | None, as_json: bool, quick: bool) -> None:
    """Time a guided call, and measure how samples follow a class, a map and the classes of pixels,
    guided by a network as it is and by experts of noise ranges. Under three minutes.

    over_plain: time over that of the network as it is.
    """
    from coterie.bench.guides import run_benchmark
    from coterie.bench.timing import Place, stamp

    result = {**stamp("guides", Place(threads=threads), rounds)}
    result |= run_benchmark(rounds, threads, quality=not quick)
    show(result, SHOWN, out, as_json, [("followed", FOLLOWED)] if not quick else [])
