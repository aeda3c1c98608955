"""``coterie bench parallel``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, show, timing_options

SHOWN = (
    "layout",
    "processes",
    "step_ms",
    "steps_per_second",
    "vs_one",
    "vs_peer",
    "cpu_ms",
    "wire_bytes",
)


@click.command("parallel")
@click.argument("recipe", default="dit-moe")
@timing_options(rounds=20)
@click.option("--processes", type=click.IntRange(2), default=2, show_default=True)
def command(
    recipe: str, threads: int, rounds: int, out: Path | None, as_json: bool, processes: int
) -> None:
    """Time training steps of a recipe in several processes of this machine.

    Layouts take turns: copies (data), shards, experts apart, and torch's DistributedDataParallel.
    vs_one: time of a step over that of one process with the whole batch; wire_bytes: what a step of
    all processes sends over the loopback interface. The clock is wall time.
    """
    import torch

    from coterie.bench.parallel import PEER, run_benchmark
    from coterie.bench.timing import Place, stamp
    from coterie.recipes import get_recipe

    config = get_recipe(recipe).config()
    result = {
        **stamp("parallel", Place(threads=threads), rounds, ("torch",)),
        "recipe": recipe,
        "batch": config.train.batch,
        "peer": f"{PEER} of torch {torch.__version__}",
        "clock": "wall",
        **run_benchmark(config, processes, rounds, threads),
    }
    show(result, SHOWN, out, as_json, [("goals", GOALS)])
