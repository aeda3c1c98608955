"""``coterie guide``: a network that reads clean pictures becomes a guide of samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coterie.cli.output import OUT, facts, say, say_json
from coterie.cli.overrides import PathsCommand, apply, split, takes_paths

if TYPE_CHECKING:
    from coterie.runs.config import RunConfig


@click.group("guide")
def command() -> None:
    """Guide the samples of a denoiser by a network that was trained on clean pictures.

    \b
      coterie guide reader runs/denoiser --out runs/reader
      coterie guide train runs/denoiser runs/reader --out runs/guide
      coterie sample runs/denoiser --guide runs/guide --labels 3 --scale 4
      coterie report runs/guide
    """


@command.command("reader", cls=PathsCommand)
@takes_paths("DENOISER [--PATH=VALUE]...")
@click.option(
    "--task",
    type=click.Choice(["classes", "map", "pixels"]),
    default="classes",
    show_default=True,
    help="What it learns to read: a class, a height map, a class per pixel.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=1000, show_default=True, help="Optimiser steps."
)
@click.option("--out", required=True, type=OUT, help="Run directory to write.")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes, FLOPs and projected minutes only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def reader(
    ctx: click.Context, arguments: tuple[str, ...], task: Any, steps: int, **options: Any
) -> None:
    """Train a small network to read the clean pictures that DENOISER was trained on: their class, a
    height map, or a class per pixel."""
    from coterie.runs.origins.guides import reader_run

    words, paths = split(arguments)
    (denoiser,) = _words(words, "DENOISER")
    _start(apply(ctx, reader_run(denoiser, task, steps), paths), **options)


@command.command("train", cls=PathsCommand)
@takes_paths("DENOISER READER [--PATH=VALUE]...")
@click.option(
    "--experts",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Experts, one per range of noise levels.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Rank of each expert's adapter.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Optimiser steps, all experts together.",
)
@click.option(
    "--samples",
    type=click.IntRange(8),
    default=1000,
    show_default=True,
    help="Samples of DENOISER to learn from.",
)
@click.option("--labels", is_flag=True, help="Learn from labelled data, not from samples.")
@click.option("--out", required=True, type=OUT, help="Run directory to write.")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes, FLOPs and projected minutes only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def train(
    ctx: click.Context,
    arguments: tuple[str, ...],
    experts: int,
    rank: int,
    steps: int,
    samples: int,
    labels: bool,
    **options: Any,
) -> None:
    """Teach the network of READER to read noisy pictures: one small adapter for each range of
    noise levels. It learns to answer for a noisy sample of DENOISER as it answers for the clean
    one, so no labels are used."""
    from coterie.runs.origins.guides import guide_run

    words, paths = split(arguments)
    denoiser, network = _words(words, "DENOISER READER")
    config = guide_run(denoiser, network, experts, rank, steps, labels, samples)
    _start(apply(ctx, config, paths), denoiser=denoiser, **options)


def _words(words: list[str], wanted: str) -> list[str]:
    if len(words) != len(wanted.split()):
        raise click.UsageError(f"expected {wanted}, got {' '.join(words) or 'nothing'}")
    return words


def _start(
    config: RunConfig, out: Path, dry_run: bool, as_json: bool, quiet: bool, denoiser: str = ""
) -> None:
    if dry_run:
        from coterie.cli.size import projection

        planned = projection(config)
        say_json(planned) if as_json else say(facts(planned))
        return
    from coterie.runs.training import start

    run = start(config, out, progress=not quiet)
    if as_json:
        say_json({"run": run})
        return
    say(f"run     {run}")
    if denoiser:
        say(f"next    coterie sample {denoiser} --guide {run} --scale 4")
    say(f"        coterie report {run}")
