"""``coterie bench experts``."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.bench_options import GOALS, LAWS, show, timing_options

SHOWN = (
    "case",
    "backend",
    "forward_ms",
    "vs_floor",
    "vs_dense",
    "vs_peer",
    "train_ms",
    "train_vs_floor",
    "train_vs_dense",
    "train_vs_peer",
)


@click.command("experts")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@timing_options(rounds=3)
@click.option("--growth", is_flag=True, help="Also fit how cost grows with experts and tokens.")
def command(
    cases: tuple[str, ...],
    threads: int,
    rounds: int,
    out: Path | None,
    as_json: bool,
    growth: bool,
) -> None:
    """Time every way to dispatch tokens to experts. Without CASE: all sizes, some minutes.

    vs_floor: time over that of the bare experts on rows that lie sorted already; vs_dense: over a
    dense layer of equal active cost; vs_peer: over the fastest way that others have; train: forward
    and backward. `auto` is what a model uses by default. The goals are those of
    docs/explanation/dispatch.md.
    """
    from coterie.bench import expert_growth
    from coterie.bench.experts import CASES, run_benchmark
    from coterie.bench.timing import Place, stamp

    place = Place(threads=threads)
    result = {
        **stamp("experts", place, rounds, ("transformers",)),
        **run_benchmark(cases or tuple(CASES), threads=threads, rounds=rounds),
    }
    tables: list[tuple[str, tuple[str, ...]]] = [("goals", GOALS)]
    if growth:
        result["growth"] = expert_growth.growth(rounds, threads)
        result["laws"] = result["growth"].pop("laws")
        tables.append(("laws", LAWS))
    show(result, SHOWN, out, as_json, tables)
