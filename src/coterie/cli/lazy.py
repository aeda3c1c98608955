"""A group of commands, each in a module of its own, imported when the command is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from coterie.core.errors import unknown


class LazyGroup(click.Group):
    """``verbs``: name -> one line of help; ``coterie.cli.<prefix><name>`` defines its ``command``.
    Listing the commands imports none of them, so that help stays quick."""

    def __init__(
        self, *args: Any, verbs: Mapping[str, str], prefix: str = "", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.verbs = verbs
        self.prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            if ctx.resilient_parsing:  # a shell completes an unfinished line: nothing to offer
                return None
            raise click.UsageError(unknown("command", cmd_name, self.verbs), ctx)
        command = importlib.import_module(f"coterie.cli.{self.prefix}{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=told)
            for name, told in self.verbs.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.verbs.items()))
