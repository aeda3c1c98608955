"""``coterie train``: train a recipe into a run directory, or go on with a run."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.output import facts, say, say_json
from coterie.cli.overrides import ANY_FLAG, run_and_config, takes_paths


@click.command("train", context_settings=ANY_FLAG)
@takes_paths("RECIPE|RUN [--PATH=VALUE]...")
@click.option("--preset", default="tiny", show_default=True, help="Sizes: tiny, paper, gpu, ...")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory. [runs/RECIPE]")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes, FLOPs and projected minutes only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    preset: str,
    out: Path | None,
    dry_run: bool,
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
    """
    folder, config = run_and_config(ctx, arguments, preset)
    if dry_run:
        from coterie.cli.size import projection

        planned = projection(config)
        say_json(planned) if as_json else say(facts(planned))
        return
    from coterie.train.run import start

    run = start(config, out or folder, progress=not quiet)
    if as_json:
        say_json({"run": run})
        return
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")
