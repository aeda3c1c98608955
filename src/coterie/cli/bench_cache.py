"""``coterie bench cache``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, show, timing_options

SHOWN = ("cache", "size", "candidate", "ms", "ratio")


@click.command("cache")
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@timing_options(rounds=5)
def command(
    caches: tuple[str, ...], threads: int, rounds: int, out: Path | None, as_json: bool
) -> None:
    """Time what exact caches save; each is checked against the answers without it. CACHE:
    references, folding. [both]

    ratio: time over that without the cache, for folded routers over that of a dense layer as wide
    as the experts that are used.
    """
    from coterie.bench.cache import CACHES, run_benchmark
    from coterie.bench.timing import Place, stamp
    from coterie.core.errors import ConfigError, unknown

    for cache in caches:
        if cache not in CACHES:
            raise ConfigError(unknown("cache", cache, list(CACHES)))
    place = Place(threads=threads)
    found = run_benchmark(rounds, threads, caches or tuple(CACHES))
    result = {**stamp("cache", place, rounds), **found}
    show(result, SHOWN, out, as_json, [("goals", GOALS)])
