"""``coterie bench cache``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, show, timing_options

SHOWN = ("cache", "size", "candidate", "ms", "ratio")


@click.command("cache")
@timing_options(rounds=5)
def command(threads: int, rounds: int, out: Path | None, as_json: bool) -> None:
    """Time what exact caches save; each is checked against the answers without it.

    ratio: time over that without the cache, for folded routers over that of a dense layer as wide
    as the experts that are used.
    """
    from coterie.bench.cache import run_benchmark
    from coterie.bench.timing import Place, stamp

    place = Place(threads=threads)
    result = {**stamp("cache", place, rounds), **run_benchmark(rounds, threads)}
    show(result, SHOWN, out, as_json, [("goals", GOALS)])
