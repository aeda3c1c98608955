"""``coterie cite``: BibTeX of the papers behind recipes."""

from __future__ import annotations

import click

from coterie.cli import candidates
from coterie.cli.output import say


@click.command("cite")
@click.argument(
    "recipes", nargs=-1, required=True, metavar="RECIPE...", shell_complete=candidates.recipes
)
def command(recipes: tuple[str, ...]) -> None:
    """Print the BibTeX of each RECIPE's paper."""
    from coterie.recipes import get_recipe

    say("\n\n".join(get_recipe(name).paper.bibtex for name in recipes))
