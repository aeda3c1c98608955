"""``coterie train``: train a recipe into a run directory, or resume it."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli.output import facts, say, say_json
from coterie.cli.overrides import ANY_FLAG, recipe_and_config, takes_paths


@click.command("train", context_settings=ANY_FLAG)
@takes_paths("RECIPE [--PATH=VALUE]...")
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
    """Train a recipe. The same command again resumes where it stopped.

    A flag with a dot is a path into the configuration (see `coterie show RECIPE`):

    \b
      coterie train dit-moe
      coterie train dit-moe --train.steps=300 --model.backbone.depth=6
      coterie train dit-moe --preset paper --dry-run
    """
    recipe, config = recipe_and_config(ctx, arguments, preset)
    if dry_run:
        from coterie.cli.size import projection

        planned = projection(config)
        say_json(planned) if as_json else say(facts(planned))
        return
    from coterie.train.run import start

    run = start(config, out or Path("runs") / recipe.name, progress=not quiet)
    if as_json:
        say_json({"run": run})
        return
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")
