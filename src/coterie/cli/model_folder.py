"""What the verbs that also take the folder of a Hugging Face model have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coterie.cli.output import note
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.json_reader import read_object

if TYPE_CHECKING:
    from coterie.interop.transformers.report import Reading

DTYPES = ("auto", "float32", "bfloat16", "float16")


def reads_text(tokens: str = "--tokens") -> Callable[[Any], Any]:
    """The options that say what a model is to read, and how; ``tokens``: the flag of how much."""
    options = (
        click.option(
            "--text",
            type=click.Path(path_type=Path),
            help="Hugging Face model: the text that it reads.",
        ),
        click.option(
            tokens, "tokens_read", type=click.IntRange(1), help="Tokens of the text to read. [8192]"
        ),
        click.option("--batch", type=click.IntRange(1), help="Windows of text per batch. [4]"),
        click.option(
            "--context", type=click.IntRange(1), help="Tokens per window. [512, or fewer]"
        ),
        click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights. [as stored]"),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def is_model(folder: Path) -> bool:
    """Whether ``config.json`` there is one of transformers: a run's names no model_type."""
    try:
        return "model_type" in config_of(folder)
    except CheckpointError:
        return False  # said by whoever reads it


def config_of(folder: Path) -> dict[str, Any]:
    """What ``config.json`` there holds, {} if there is none; CheckpointError for a damaged one,
    which nobody could say of whose it is."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).removeprefix(f'{path}: ')}"
        ) from None


def given_of(options: dict[str, Any], folder: Path, flags: dict[str, str]) -> dict[str, Any]:
    """The options of :func:`reads_text` that were given; an error where ``folder`` is no model.
    ``flags``: their names where they differ."""
    given = {name: value for name, value in options.items() if value is not None}
    if given and "model_type" not in config_of(folder):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        first = next(iter(given))
        flag = flags.get(first, first)
        raise ConfigError(f"--{flag}: only for the folder of a Hugging Face model, not {folder}")
    return given


def prepare(folder: Path, given: dict[str, Any]) -> Reading:
    """The model's folder and its text, checked; no weight is read."""
    if "text" not in given:
        raise ConfigError(f"--text: missing; {folder} is a model, say what it is to read")
    from coterie.interop.transformers.report import Reading

    named = {"tokens": given["tokens_read"]} if "tokens_read" in given else {}
    rest = {name: given[name] for name in ("batch", "context", "dtype") if name in given}
    return Reading.prepare(folder, given["text"], **named, **rest)


def load(reading: Reading, quiet: bool) -> None:
    """Load and check the model, and say what a reader must know of it."""
    for text in reading.notes():
        note(f"note: {text}")
    if not quiet:
        weights = reading.sizes()["weights_gib"]
        note(f"loading and checking {reading.folder.path} ({weights:g} GiB)")
    _ = reading.model
