"""``coterie compose``: trained models as one, whose samples have a known law."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, say, say_json
from coterie.core.errors import ConfigError, describe
from coterie.core.json_reader import parse_json


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers between commas, such as ``1,1`` or ``-2,3``."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(piece) for piece in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; for example 1,1 or -2,3")


class Told(click.ParamType[tuple[Any, ...]]):
    """What each model is told: ``given``, ``null`` or a class, between commas."""

    name = "labels"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        pieces = str(value).split(",")
        for piece in pieces:
            if piece not in ("given", "null") and not piece.isdecimal():
                self.fail(f"{piece!r} is neither given, nor null, nor the number of a class")
        return tuple(int(piece) if piece.isdecimal() else piece for piece in pieces)


class Kind(click.ParamType[dict[str, Any]]):
    """A kind of part, or a JSON object with ``kind``."""

    name = "kind"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        if not str(value).lstrip().startswith("{"):
            return {"kind": str(value)}
        try:
            found: dict[str, Any] = parse_json(value, str(param.name if param else "value"))
        except ConfigError as error:
            self.fail(str(error))
        return found


@click.command("compose")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN...",
    shell_complete=candidates.runs,
)
@click.option(
    "--betas", type=Numbers(), help="Power of each model's density. [1 each; average: 1 / M]"
)
@click.option(
    "--mode",
    type=click.Choice(["product", "average", "anneal", "tilt"]),
    default="product",
    show_default=True,
    help="Product of densities, geometric average, power of one, or density times exp(reward).",
)
@click.option("--tilt", type=float, help="Mode tilt: factor of the reward.")
@click.option("--reward", type=Kind(), help="Mode tilt: brightness, symmetry, or JSON of a reward.")
@click.option(
    "--labels",
    type=Told(),
    help="Label each RUN is given: that of the sample, null or a class. [given]",
)
@click.option("--process", help="Noising process to sample in, where the RUNs differ.")
@click.option(
    "--data", type=Kind(), help="Data source, where no RUN is a run directory: a kind or JSON."
)
@click.option(
    "--view",
    type=click.Choice(["eps", "x0", "v", "flow"]),
    help="What diffusers networks without a scheduler predict. [eps]",
)
@click.option(
    "--corrector",
    type=click.Choice(["fkc", "none"]),
    default="fkc",
    show_default=True,
    help="Exact in the limit, by weighted particles; or the plain sum of scores.",
)
@click.option(
    "--particles",
    type=int,
    default=8,
    show_default=True,
    help="Particles drawn together; they become as many samples.",
)
@click.option(
    "--scheme",
    type=click.Choice(["multinomial", "stratified", "systematic", "residual"]),
    default="systematic",
    show_default=True,
    help="How particles are resampled.",
)
@click.option(
    "--ess",
    type=float,
    default=0.5,
    show_default=True,
    help="Resample below this share of effective particles.",
)
@click.option("--clamp", type=float, help="Largest change of a log weight per step; a bias. [off]")
@click.option("--out", type=OUT, required=True, help="Run to write.")
@click.option("-n", "--dry-run", is_flag=True, help="The configuration only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    runs: tuple[Path, ...],
    betas: tuple[float, ...] | None,
    mode: str,
    tilt: float | None,
    reward: dict[str, Any] | None,
    labels: tuple[Any, ...] | None,
    process: str | None,
    data: dict[str, Any] | None,
    view: str | None,
    corrector: str,
    particles: int,
    scheme: str,
    ess: float,
    clamp: float | None,
    out: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compose trained models by their densities: product, average, power, or times a reward.

    The result is a run that trains nothing and is sampled like any other.

    RUN: a run or model directory, a pipeline of diffusers, or one network of it.

    \b
      coterie compose runs/low runs/high --mode average --out runs/both
      coterie compose runs/dit runs/dit --labels null,given --betas -2,3 --out runs/guided
      coterie compose runs/low --mode anneal --betas 2 --particles 32 --out runs/sharp
      coterie compose runs/low --mode tilt --tilt 40 --reward brightness --out runs/bright
      coterie sample runs/both
    """
    from coterie.data import SOURCES
    from coterie.ensembles.product import CompositionConfig
    from coterie.runs.origins.composition import composed_run
    from coterie.runs.training import start
    from coterie.solvers import FeynmanKacConfig

    composition = CompositionConfig.from_dict(
        {
            "mode": mode,
            "betas": betas,
            "tilt": tilt or 0.0,
            "reward": reward,
            "labels": labels,
            "process": process,
            "corrector": corrector,
        }
    )
    if mode == "tilt":
        check_tilt(tilt, reward)
    settings = {"particles": particles, "scheme": scheme, "ess": ess, "clamp": clamp}
    solver = FeynmanKacConfig.from_dict(settings) if corrector == "fkc" else None
    source = None if data is None else SOURCES.parse(data)
    config = composed_run(runs, composition, solver, source, view)
    if dry_run:
        say(config.to_json())
        return
    run = start(config, out, progress=False)
    if as_json:
        say_json({"run": run, "experts": runs, "config": config.model_dump(mode="json")})
        return
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")


def check_tilt(tilt: float | None, reward: Mapping[str, Any] | None) -> None:
    """ConfigError unless a tilt says what to, and how much."""
    from coterie.ensembles.rewards import REWARDS

    if not reward:
        raise ConfigError(describe("--reward", None, f"one of {', '.join(REWARDS.kinds())}"))
    if not tilt:
        raise ConfigError(describe("--tilt", tilt, "a number that is not 0"))
