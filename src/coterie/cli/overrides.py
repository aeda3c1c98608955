"""Flags that are paths into the configuration: ``--train.steps=300`` or ``--train.steps 300``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from coterie.cli import candidates

if TYPE_CHECKING:
    from coterie.recipes import Recipe
    from coterie.runs.config import RunConfig

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class PathsCommand(click.Command):
    """A command that takes configuration paths as flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        any_flag = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
        super().__init__(*args, **{**kwargs, "context_settings": any_flag})

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Options, and paths of the configuration where the first word names one."""
        found = super().shell_complete(ctx, incomplete)
        (arguments,) = [one for one in self.params if isinstance(one, click.Argument)]
        named = str(arguments.metavar).startswith("RECIPE")
        return found + candidates.flags(ctx, incomplete) if named else found


def takes_paths(metavar: str) -> Callable[[CommandT], CommandT]:
    """Decorator: collect what is no option of the command as ``arguments`` (see :func:`split`).

    The first word of ``metavar`` says what a shell offers for the words: RECIPE, RUN or both.
    """
    word = metavar.split()[0]
    offered = {
        "RECIPE": candidates.recipes,
        "RECIPE|RUN": candidates.recipes_and_runs,
        "[--PATH=VALUE]...": None,
    }.get(word, candidates.runs)
    return click.argument(
        "arguments", nargs=-1, type=click.UNPROCESSED, metavar=metavar, shell_complete=offered
    )


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Positional words, and ``{path: text}`` of the flags. The last of equal flags wins.

    Raises click.UsageError for a flag without a value.
    """
    words: list[str] = []
    paths: dict[str, str] = {}
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--"):
            if argument.startswith("-") and len(argument) > 1:
                raise click.NoSuchOption(argument)
            words.append(argument)
            continue
        path, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise click.UsageError(f"--{path} needs a value: --{path}=VALUE")
        paths[path.replace("-", "_")] = value
    return words, paths


def one_word(words: Sequence[str], what: str) -> str:
    """The only positional argument, named ``what`` in the error."""
    if not words or not words[0]:
        raise click.UsageError(f"missing {what}")
    if len(words) > 1:
        raise click.UsageError(f"one {what} at a time; unexpected: {' '.join(words[1:])}")
    return words[0]


def apply(ctx: click.Context, config: RunConfig, paths: Mapping[str, str]) -> RunConfig:
    """The configuration with the flags applied, validated.

    A flag that is neither an option of the command nor a field at the top of the configuration
    is reported against both, so that a misspelt option is recognised.
    """
    from coterie.core.config import override

    fields = type(config).model_fields
    for path in paths:
        if path.split(".")[0] not in fields:
            raise click.NoSuchOption(
                f"--{path}", possibilities=_close(path, [*_options(ctx), *fields]), ctx=ctx
            )
    return override(config, paths)


def recipe_and_config(
    ctx: click.Context, arguments: Sequence[str], preset: str
) -> tuple[Recipe, RunConfig]:
    """What ``RECIPE [--PATH=VALUE]...`` asks for."""
    words, paths = split(arguments)
    name = one_word(words, "RECIPE")
    from coterie.recipes import get_recipe

    recipe = get_recipe(name)
    return recipe, apply(ctx, recipe.config(preset), paths)


def run_and_config(
    ctx: click.Context, arguments: Sequence[str], preset: str
) -> tuple[Path, RunConfig]:
    """What ``RECIPE|RUN [--PATH=VALUE]...`` asks for: where to train by default, and what.

    A folder with a configuration is a run; its flags may only change what a resumed run may.
    """
    words, paths = split(arguments)
    path = Path(one_word(words, "RECIPE or RUN"))
    if not (path / "config.json").is_file():
        recipe, config = recipe_and_config(ctx, arguments, preset)
        return Path("runs") / recipe.name, config
    from coterie.runs.config import RunConfig

    return path, apply(ctx, RunConfig.load(path / "config.json"), paths)


def _options(ctx: click.Context) -> list[str]:
    return [
        flag.lstrip("-")
        for parameter in ctx.command.params
        if isinstance(parameter, click.Option)
        for flag in parameter.opts
    ]


def _close(path: str, known: Iterable[str]) -> list[str]:
    import difflib

    head, dot, rest = path.partition(".")
    close = difflib.get_close_matches(head, list(known), n=3)
    return [f"--{name}{dot}{rest}" for name in close]
