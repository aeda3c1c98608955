"""``coterie rollout``: a policy at work in the simulator its demonstrations come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, facts, progress_bar, say, say_json, table, threads_option
from coterie.cli.sample import Labels


@click.command("rollout")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=candidates.runs)
@click.option("--num", type=click.IntRange(1), default=200, show_default=True, help="Episodes.")
@click.option("--labels", type=Labels(), help="Goals in turn: 3, or 0,3, or 0-3. [all]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of starting states and noise."
)
@click.option("--steps", type=click.IntRange(1), help="Solver steps per chunk. [the run's]")
@click.option(
    "--cached", is_flag=True, help="Use every exact cache: same actions, less time; says how much."
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    default="ema",
    show_default=True,
    help="Averaged weights, or those of the last step.",
)
@click.option("--out", type=OUT, help="Folder. [RUN/rollouts]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@threads_option("torch's own")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    run: Path,
    num: int,
    cached: bool,
    weights: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the policy of RUN in its simulator: success rate with 95 % Wilson interval, pictures.

    A chunk of actions is carried out whole, then the next one is sampled.

    \b
      coterie rollout runs/mode-policy --num 200
      coterie rollout runs/mode-policy --cached --labels 0,3
    """
    from coterie.runs.sample.rollout_files import rollout_run
    from coterie.runs.trained_run import load_run

    loaded = load_run(run, which=weights)
    with progress_bar(num, "episodes", quiet) as advance:
        found = rollout_run(loaded, num, out or run / "rollouts", cached, advance, **options)
    if as_json:
        say_json(found)
        return
    say(table(found["goals"]))
    if cached:
        say(facts(found["cache"]))
    say(f"pictures  {found['pictures']}")
