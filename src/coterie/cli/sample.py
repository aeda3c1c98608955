"""``coterie sample``: draw samples from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli.output import progress_bar, say, say_json


class Labels(click.ParamType[list[int]]):
    """Class numbers such as ``3``, ``0,3,7`` or ``0-9``."""

    name = "labels"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        labels: list[int] = []
        try:
            for piece in str(value).split(","):
                first, dash, last = piece.partition("-")
                labels += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            labels = []
        if not labels:
            self.fail(f"{value!r} is no list of class numbers; for example 0,3,7 or 0-9")
        return labels


@click.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--num", type=click.IntRange(1), default=64, show_default=True)
@click.option("--labels", type=Labels(), help="Classes in turn: 3, or 0,3,7, or 0-9. [all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first sample.")
@click.option("--steps", type=click.IntRange(1), help="Solver steps. [the run's]")
@click.option("--guidance", type=float, help="Guidance weight. [the run's]")
@click.option("--weights", type=click.Choice(["ema", "model"]), default="ema", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [RUN/samples]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    run: Path,
    num: int,
    labels: list[int] | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    weights: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw samples from RUN. Sample i depends on its seed alone, whatever else is drawn.

    \b
      coterie sample runs/dit-moe --num 100 --labels 0-9 --guidance 2
    """
    from coterie.train.run import load_run
    from coterie.train.samples import sample_run

    loaded = load_run(run, which=weights)
    with progress_bar(num, "sampling", quiet) as advance:
        shown = sample_run(
            loaded,
            num=num,
            labels=labels,
            seed=seed,
            steps=steps,
            guidance=guidance,
            out=out or run / "samples",
            progress=advance,
        )
    say_json({"samples": shown.parent, "shown": shown}) if as_json else say(f"samples  {shown}")
