"""``coterie aggregate``: networks of one topology, fused feature by feature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coterie.cli.output import OUT, facts, say, say_json, table
from coterie.cli.overrides import PathsCommand, split, takes_paths

if TYPE_CHECKING:
    from coterie.ensembles.headroom import Headroom


@click.command("aggregate", cls=PathsCommand)
@takes_paths("RUN RUN... [--PATH=VALUE]...")
@click.option(
    "--headroom", is_flag=True, help="Train nothing: say what the best weights could gain."
)
@click.option(
    "--gate",
    type=click.Choice(["spatial", "step", "uniform"]),
    default="spatial",
    show_default=True,
    help="Weights per pixel, weights per noise level, or equal weights.",
)
@click.option(
    "--points",
    default="*",
    show_default=True,
    help="Layers to fuse: mid,up.*; answer: the output alone.",
)
@click.option(
    "--width", type=click.IntRange(1), help="Channels of the network that makes the weights. [128]"
)
@click.option("--layers", type=click.IntRange(0), help="Transformer layers of that network. [2]")
@click.option("--heads", type=click.IntRange(1), help="Attention heads of that network. [8]")
@click.option("--groups", type=click.IntRange(1), help="Groups of its group norms. [32]")
@click.option(
    "--process", help="Noising process of diffusers networks that come without a scheduler."
)
@click.option(
    "--view",
    type=click.Choice(["eps", "x0", "v", "flow"]),
    help="What diffusers networks without a scheduler predict. [eps]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Held-out samples to measure.",
)
@click.option("--out", type=OUT, help="Run to write.")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes, FLOPs and projected minutes only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    arguments: tuple[str, ...],
    headroom: bool,
    gate: str,
    points: str,
    process: str | None,
    view: str | None,
    samples: int,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **sizes: int | None,
) -> None:
    """Fuse networks of one architecture: trained weights per layer and pixel.

    Aggregators weigh the features of RUNs per pixel and layer; the RUNs stay as they are. First ask
    whether there is anything to gain; then train. The same command again resumes. RUN: a run or
    model directory, a pipeline of diffusers, or one U-Net of it; without any run, name --data.

    \b
      coterie aggregate runs/a runs/b --headroom
      coterie aggregate runs/a runs/b --out runs/both --train.steps=500
      coterie aggregate runs/a runs/b --out runs/answers --points answer --width 16
      coterie aggregate unets/a unets/b --process ddpm --data digits --out runs/unets
      coterie report runs/both
    """
    runs, paths = split(arguments)
    if not runs:
        raise click.UsageError("missing RUN")
    if headroom:
        from coterie.runs.origins.aggregation import probe_headroom

        found = probe_headroom(runs, paths, samples, process, view)
        _say_headroom(found, as_json)
        return
    if out is None and not dry_run:
        raise click.UsageError("missing --out, the run to write")
    from coterie.ensembles import AggregateConfig
    from coterie.runs.origins.aggregation import aggregated_run
    from coterie.runs.training import start

    given = {name: value for name, value in sizes.items() if value is not None}
    patterns = [] if points == "answer" else points.split(",")
    aggregate = AggregateConfig.from_dict({"gate": gate, "points": patterns, "aggregator": given})
    config = aggregated_run(runs, aggregate, paths, process, view)
    if dry_run:
        from coterie.cli.size import projection

        planned = projection(config)
        say_json(planned) if as_json else say(facts(planned))
        return
    assert out is not None
    run = start(config, out, progress=not quiet)
    if as_json:
        say_json({"run": run, "experts": runs})
        return
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")


def _say_headroom(found: Headroom, as_json: bool) -> None:
    from coterie.ensembles.headroom import GO

    gains = {name: found.gain(name) for name in ("oracle", "predictable", "per_sample")}
    if as_json:
        say_json({"gains": gains, "threshold": GO, "go": found.go, "found": found})
        return
    say(table(_rows(found)))
    say()
    say(f"best alone    {found.best}, mean squared error of eps {min(found.alone):.4g}")
    say(f"oracle        {gains['oracle']:+.2%} per pixel, luck included")
    told = f"{gains['predictable']:+.2%} per pixel, {gains['per_sample']:+.2%} per sample"
    say(f"predictable   {told}")
    verdict = "train aggregators" if found.go else "little to learn: keep the best, or average"
    say(f"verdict       {'go' if found.go else 'no go'} (from {GO:.0%}): {verdict}")


def _rows(found: Headroom) -> list[dict[str, Any]]:
    return [
        {
            "noise": level.noise,
            **dict(zip(found.names, level.alone, strict=True)),
            "oracle": level.oracle,
            "predictable": level.predictable,
            "same winner": level.agreement,
            "by chance": level.chance,
        }
        for level in found.levels
    ]
