"""``coterie ranges``: denoisers that each answer for a range of noise levels, as one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli.output import OUT, say, say_json
from coterie.cli.overrides import PathsCommand, split, takes_paths


@click.command("ranges", cls=PathsCommand)
@takes_paths("RUN RUN... [--PATH=VALUE]...")
@click.option("--boundaries", help="Noise levels between the RUNs, from noisy to clean: 0.7,0.3.")
@click.option(
    "--in",
    "unit",
    type=click.Choice(["t", "sigma", "log_snr"]),
    default="t",
    show_default=True,
    help="Unit of the boundaries.",
)
@click.option("--search", is_flag=True, help="Find order and boundaries on held-out data.")
@click.option(
    "--bins",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Noise levels that a search measures.",
)
@click.option("--guidance", help="Guidance weight of each range, from noisy to clean: 4,2.")
@click.option("--precision", help="Precision of each RUN: bfloat16,float32.")
@click.option(
    "--live", is_flag=True, help="Use the newest weights of RUNs that are still being trained."
)
@click.option("--out", type=OUT, help="Run to write.  [required]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    arguments: tuple[str, ...],
    boundaries: str | None,
    unit: Any,
    search: bool,
    bins: int,
    guidance: str | None,
    precision: str | None,
    live: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Join RUNs, each of which answers in its range of noise levels, the noisiest first.

    Train an expert of a range from a base run, then join them:

    \b
      coterie train dit --out runs/base
      coterie train dit --out runs/noisy --init.path=runs/base \\
          --objective.times='{"kind":"within","times":"logit_normal","low":0.5}'
      coterie train dit --out runs/clean --init.path=runs/base \\
          --objective.times='{"kind":"within","times":"logit_normal","high":0.5}'
      coterie ranges runs/noisy runs/clean --boundaries 0.5 --out runs/pair
      coterie ranges runs/clean runs/noisy --search --out runs/pair
    """
    runs, paths = split(arguments)
    if search == (boundaries is not None):
        raise click.UsageError("give either --boundaries or --search")
    if out is None and not search:
        raise click.UsageError("missing --out, the run to write")
    from coterie.runs.origins.noise_ranges import find_boundaries, join_ranges

    levels = () if boundaries is None else _numbers("boundaries", boundaries)
    found: dict[str, Any] = {}
    if search:
        runs, cut = find_boundaries(runs, bins)
        levels, unit = cut.boundaries, "t"
        found = {"loss": cut.loss, "best_alone": cut.best_alone}
    found = {"runs": runs, "boundaries": list(levels), "in": unit, **found}
    if len(runs) == 1 and search:
        found["note"] = "this run is the best at every level"
    elif out is not None:
        weights = None if guidance is None else _numbers("guidance", guidance)
        kinds = None if precision is None else precision.split(",")
        found["run"] = join_ranges(runs, levels, out, unit, weights, paths, live, kinds)
    if as_json:
        say_json(found)
        return
    for name, value in found.items():
        say(f"{name:10}  {value}")
    if "run" in found:
        say(f"next        coterie sample {found['run']}")


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--{name} {text}: expected numbers such as 0.7,0.3") from None
