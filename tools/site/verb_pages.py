"""The page of the command line, made of what every verb says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from coterie.cli.main import VERBS, cli

UNWRAPPED = "\b\n"
"""Before a paragraph of a help text whose lines stay as they are: commands, as a rule."""


def help_text(command: click.Command) -> Iterator[str]:
    """The paragraphs of a help text; those that keep their lines as code."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith(UNWRAPPED):
            code = inspect.cleandoc(paragraph.removeprefix(UNWRAPPED))
            yield f"```text\n{code}\n```"
        elif paragraph:
            yield plain(paragraph)


def plain(text: str) -> str:
    """Words that Markdown takes as they are, in one line."""
    return " ".join(text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").split())


def options(command: click.Command, context: click.Context) -> str:
    """A table of the options with what ``--help`` says of each; "" where there are none."""
    given = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    records = [option.get_help_record(context) for option in given]
    rows = [
        f"| `{names}` | {plain(said)} |"  # within code, a bar ends no cell
        for names, said in filter(None, records)
        if not names.endswith("--help")
    ]
    return "\n".join(["| option | does |", "| --- | --- |", *rows]) if rows else ""


def sections(command: click.Command, context: click.Context, level: int = 2) -> Iterator[str]:
    """A verb, then the verbs below it."""
    path = context.command_path
    yield f"{'#' * level} {path} {{ #{path.replace(' ', '-')} }}"
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```"
    yield from help_text(command)
    yield options(command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            inside = click.Context(below, parent=context, info_name=name)
            yield from sections(below, inside, level + 1)


def page() -> str:
    rows = [f"| [`{verb}`](#coterie-{verb}) | {plain(line)} |" for verb, line in VERBS.items()]
    said = [
        "# Verbs of the command line",
        "`coterie VERB --help` prints the same. The same command again resumes what was "
        "interrupted. Any flag with a dot is a path into the "
        "[configuration](parts/configuration.md).",
        "\n".join(["| verb | does |", "| --- | --- |", *rows]),
    ]
    root = click.Context(cli, info_name="coterie")
    for verb in VERBS:
        command = cli.get_command(root, verb)
        assert command is not None
        said += sections(command, click.Context(command, parent=root, info_name=verb))
    return "\n\n".join(filter(None, said)) + "\n"


def pages() -> dict[str, str]:
    """Path below ``docs`` -> text."""
    return {"reference/verbs.md": page()}
