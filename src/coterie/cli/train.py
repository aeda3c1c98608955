"""``coterie train``: train a recipe into a run directory, or go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, facts, note, say, say_json
from coterie.cli.overrides import PathsCommand, run_and_config, takes_paths


@click.command("train", cls=PathsCommand)
@takes_paths("RECIPE|RUN [--PATH=VALUE]...")
@click.option(
    "--preset",
    default="tiny",
    show_default=True,
    shell_complete=candidates.presets,
    help="Named sizes: tiny (minutes on a CPU), gpu, paper, ...",
)
@click.option("--out", type=OUT, help="Run directory. [runs/RECIPE]")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes, FLOPs and projected minutes only.")
@click.option(
    "--parallel", metavar="DEGREES", help="Train in several processes: data=2, or expert=2,shard=2."
)
@click.option(
    "--restarts",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How often to start again after a process has died.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds after which a process that others wait for counts as dead.",
)
@click.option("--oversubscribe", is_flag=True, help="Allow more processes than there are cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    preset: str,
    out: Path | None,
    dry_run: bool,
    parallel: str | None,
    restarts: int,
    timeout: float,
    oversubscribe: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a recipe, or go on with a run directory. The same command again resumes.

    A flag with a dot is a path into the configuration (see `coterie show RECIPE`):

    \b
      coterie train dit-moe
      coterie train dit-moe --train.steps=300 --model.backbone.depth=6
      coterie train dit-moe --preset paper --dry-run
      coterie train dit-moe --init.path=runs/other --train.lr=1e-4
      coterie train runs/dit-moe
      coterie train dit-moe --parallel data=2
      torchrun --nproc-per-node 2 -m coterie.cli train dit-moe --parallel expert=2

    With --parallel it starts the processes itself, and again when one dies; under torchrun it is
    one of them. A run goes on under any degrees, whatever it was begun with.
    """
    folder, config = run_and_config(ctx, arguments, preset)
    if dry_run:
        from coterie.cli.size import projection

        planned = {**projection(config), **_started(config, parallel, oversubscribe)}
        say_json(planned) if as_json else say(facts(planned))
        return
    run = out or folder
    if parallel is None:
        from coterie.runs.training import start

        start(config, run, progress=not quiet)
    elif not _in_processes(config, run, parallel, restarts, timeout, oversubscribe, quiet):
        return
    if as_json:
        say_json({"run": run})
        return
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")


def _started(config: Any, degrees: str | None, oversubscribe: bool) -> dict[str, int]:
    """What --parallel would start; refused as it would be."""
    if degrees is None:
        return {}
    from coterie.runs.launch import planned
    from coterie.train.parallel import ParallelConfig

    return planned(config, ParallelConfig.parse(degrees), oversubscribe)


def _in_processes(
    config: Any,
    run: Path,
    degrees: str,
    restarts: int,
    timeout: float,
    oversubscribe: bool,
    quiet: bool,
) -> bool:
    """Train in several processes, of which this starts all or is one; whether it is to report."""
    from coterie.runs.launch import launch
    from coterie.runs.training import start
    from coterie.train.parallel import ParallelConfig, Spread, joined, launched

    parallel = ParallelConfig.parse(degrees)
    if launched():
        with joined(parallel, timeout) as processes:
            start(config, run, not quiet, Spread(processes))
            return processes.rank == 0
    launch(
        config, run, parallel, progress=not quiet, restarts=restarts, timeout=timeout,
        oversubscribe=oversubscribe, say=note,
    )  # fmt: skip
    return True
