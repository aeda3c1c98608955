"""``coterie bench sampling``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, show, timing_options

SHOWN = ("case", "candidate", "step_ms", "vs_ddim", "vs_products", "difference", "compile_seconds")


@click.command("sampling")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@timing_options(rounds=5)
@click.option("--compile", "compiled", is_flag=True, help="Also compile tiny: another minute.")
def command(
    cases: tuple[str, ...],
    threads: int,
    rounds: int,
    out: Path | None,
    as_json: bool,
    compiled: bool,
) -> None:
    """Time guided sampling beside diffusers with the same weights. CASE: tiny, S2. [both]

    vs_ddim: time over that of diffusers' DDIM loop; vs_products: over that of the network's
    products and attention alone; difference: largest, as a share of the largest value.
    """
    from coterie.bench.sampling import run_benchmark
    from coterie.bench.sampling_cases import CASES
    from coterie.bench.timing import Place, stamp
    from coterie.core.errors import ConfigError, unknown

    for case in cases:
        if case not in CASES:
            raise ConfigError(unknown("case", case, list(CASES)))
    found = run_benchmark(cases or tuple(CASES), rounds, threads, compiled)
    place = Place(threads=threads)
    result = {**stamp("sampling", place, rounds, ("diffusers",)), **found}
    show(result, SHOWN, out, as_json, [("goals", GOALS)])
