"""``coterie completion``: the script by which a shell completes words of ``coterie``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from coterie.cli.output import say

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes verbs, recipes, presets, runs and flags.

    \b
      eval "$(coterie completion bash)"       # a line for ~/.bashrc
      eval "$(coterie completion zsh)"        # for ~/.zshrc, after compinit
      coterie completion fish | source        # for ~/.config/fish/config.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows the three
    # The template by itself: click's `source` starts a shell to look at its version.
    script = made(ctx.find_root().command, {}, "coterie", "_COTERIE_COMPLETE")
    say(script.source_template % script.source_vars())
