"""``coterie sample``: draw samples from a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, human, progress_bar, say, say_json, threads_option

MOST_LABELS = 100_000
_SAID = click.core.ParameterSource.COMMANDLINE


class Labels(click.ParamType[list[int]]):
    """Class numbers such as ``3``, ``0,3,7`` or ``0-9``."""

    name = "labels"
    what = "class number"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        labels: list[int] = []
        try:
            for piece in str(value).split(","):
                first, dash, last = piece.partition("-")
                ends = int(first), int(last if dash else first)
                if ends[1] - ends[0] >= MOST_LABELS:
                    self.fail(f"{piece!r} is more than {MOST_LABELS:,} {self.what}s")
                labels += range(ends[0], ends[1] + 1)
        except ValueError:
            labels = []
        if not labels:
            self.fail(f"{value!r} is no list of {self.what}s; for example 0,3,7 or 0-9")
        return labels


class Seeds(Labels):
    """Seeds of samples: whole numbers, as :class:`Labels`."""

    name = "seeds"
    what = "seed"


class Places(Labels):
    """Numbers of samples in a draw."""

    name = "index"
    what = "sample number"


@click.command("sample")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=candidates.runs)
@click.option(
    "--num",
    type=click.IntRange(1, 1_000_000),
    default=64,
    show_default=True,
    help="Samples to draw.",
)
@click.option(
    "--labels", type=Labels(), help="Classes to draw, in turn: 3, or 0,3,7, or 0-9. [all]"
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the draw. The seed of sample i follows from it and i; samples.json has it.",
)
@click.option(
    "--index",
    type=Places(),
    help="Draw only these of the --num samples, the same to the bit: 3, or 0,3,7, or 0-9.",
)
@click.option(
    "--seeds",
    type=Seeds(),
    help="Draw the samples with these seeds of samples.json: 3,17,42.",
)
@click.option("--steps", type=click.IntRange(1, 100_000), help="Solver steps. [the run's]")
@click.option("--guidance", type=float, help="Guidance weight. [the run's]")
@click.option(
    "--guide",
    type=click.Path(exists=True, path_type=Path),
    help="Run of `coterie guide train` whose gradient guides the samples.",
)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Strength of the guide.")
@click.option(
    "--target",
    type=click.Path(exists=True, path_type=Path),
    help="Picture to match, for guides of maps or pixels. [held-out pictures]",
)
@click.option(
    "--cached",
    "use_cache",
    is_flag=True,
    help="Use every exact cache: the same samples in less time.",
)
@click.option(
    "--compile",
    "use_compiler",
    is_flag=True,
    help="Compile the network first (about a minute): the same samples to rounding.",
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    default="ema",
    show_default=True,
    help="Averaged weights, or those of the last step.",
)
@click.option("--out", type=OUT, help="Folder. [RUN/samples, RUN/guided]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@threads_option()
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def command(
    ctx: click.Context,
    run: Path,
    num: int,
    labels: list[int] | None,
    seed: int,
    index: list[int] | None,
    seeds: list[int] | None,
    steps: int | None,
    guidance: float | None,
    guide: Path | None,
    scale: float,
    target: Path | None,
    use_cache: bool,
    use_compiler: bool,
    weights: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw samples from RUN. Sample i depends on its seed alone, whatever else is drawn.

    \b
      coterie sample runs/dit-moe --num 100 --labels 0-9 --guidance 2
      coterie sample runs/dit-moe --seed 5 --index 3
      coterie sample runs/dit-moe --seeds 3,17,42 --labels 7
      coterie sample runs/switch-dit --cached
      coterie sample runs/denoiser --guide runs/guide --labels 3 --scale 4
    """
    if seeds is not None:
        given = [n for n in ("seed", "num") if ctx.get_parameter_source(n) is _SAID]
        if "seed" in given:
            raise click.UsageError("--seed and --seeds: samples have seeds of one kind; leave one")
        if given and num != len(seeds):
            raise click.UsageError(f"--num {num}: --seeds names {len(seeds)} samples; leave --num")
    from coterie.runs.sample.sample_files import sample_run
    from coterie.runs.trained_run import load_run

    loaded = load_run(run, which=weights)
    folder = run / "samples"
    if guide is not None:
        from coterie.runs.sample.guides import with_guide

        loaded = with_guide(loaded, guide, scale, target)
        folder = run / "guided"
    elif target is not None or scale != 1.0:
        raise click.UsageError("--scale and --target are those of a --guide")
    saved: dict[str, Any] = {}
    if use_cache:
        from coterie.runs.sample.caches import cached

        loaded, cost = cached(loaded, steps)
        saved = {"caches": list(loaded.model.caches), **cost.as_dict()}
    if use_compiler:
        from coterie.runs.sample.caches import compiled

        loaded = compiled(loaded)
    count = len(index or ()) or len(seeds or ()) or num
    with progress_bar(count, "sampling", quiet) as advance:
        shown = sample_run(
            loaded,
            num=num,
            labels=labels,
            seed=seed,
            steps=steps,
            guidance=guidance,
            out=out or folder,
            progress=advance,
            index=index,
            seeds=seeds,
        )
    if as_json:
        say_json({"samples": shown.parent, "shown": shown, **({"cache": saved} if saved else {})})
        return
    say(f"samples  {shown}")
    if saved:
        say(f"cache    {_saving(saved)}")


def _saving(cost: Mapping[str, Any]) -> str:
    """What a cache saves, in a line."""
    flops, every = cost["flops_with"], cost["flops_all_experts"]
    return (
        f"{', '.join(cost['caches'])}: {human(flops)} FLOPs per call and sample, "
        f"{cost['flops_saved']:.1%} fewer than without; "
        f"{1 - flops / every:.1%} fewer than if every expert ran; numbers in memory: "
        f"{human(cost['parameters_with'])} for {human(cost['parameters_without'])}"
    )
