"""``coterie show``: the configuration and the size of a recipe."""

from __future__ import annotations

import click

from coterie.cli import candidates
from coterie.cli.output import facts, say, say_json
from coterie.cli.overrides import PathsCommand, recipe_and_config, takes_paths


@click.command("show", cls=PathsCommand)
@takes_paths("RECIPE [--PATH=VALUE]...")
@click.option("--preset", default="tiny", show_default=True, shell_complete=candidates.presets)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...], preset: str, as_json: bool) -> None:
    """Print the paper, the whole configuration and the size of a recipe.

    Every name in the configuration is a flag of `coterie train`, its path joined by dots.
    """
    recipe, config = recipe_and_config(ctx, arguments, preset)
    from coterie.cli.size import size_of

    size = size_of(config)
    if as_json:
        say_json(
            {
                "recipe": recipe.name,
                "paper": recipe.paper,
                "preset": preset,
                "presets": recipe.presets(),
                "config": config.model_dump(mode="json"),
                "plan": size,
                "claims": list(recipe.claims),
                "departures": list(recipe.departures),
            }
        )
        return
    paper = recipe.paper
    say(f"{recipe.name}: {recipe.summary}")
    say(f"{paper.title}. {paper.authors}. {paper.venue} {paper.year}. arXiv:{paper.arxiv}")
    say(f"\npreset {preset} (of {', '.join(recipe.presets())})")
    say(config.to_json())
    say("\n" + facts(size))
    if recipe.departures:
        say("\ndepartures from the paper")
        say("\n".join(f"  - {line}" for line in recipe.departures))
