"""Paths in configuration files are relative to the file's folder, so that folders can be moved.

In memory a path is absolute, or relative to the current folder. Inside :func:`beside`, fields of
type :data:`Place` are converted as a configuration is written or read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from coterie.core.errors import DataError, describe

_folder: ContextVar[Path | None] = ContextVar("folder of the file", default=None)


@contextmanager
def beside(folder: str | Path) -> Iterator[None]:
    """Inside the block, configurations are written to, or read from, files in ``folder``."""
    token = _folder.set(Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def placed(text: str, folder: str | Path) -> str:
    """A path read from a file in ``folder``, made absolute."""
    if os.path.isabs(text) or text.startswith("~"):
        return text
    return os.path.realpath(os.path.join(folder, text))


def relative(text: str, folder: str | Path) -> str:
    """A path as written to a file in ``folder``; absolute if the two share only the root folder."""
    if text.startswith("~"):
        return text
    there, here = os.path.realpath(text), os.path.realpath(folder)
    together = os.path.commonpath([there, here])
    return there if together == os.path.dirname(together) else os.path.relpath(there, here)


def expanded(path: str | Path, field: str) -> Path:
    """``path`` with ``~`` replaced by the home folder; DataError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user without a home, or no such user
        allowed = "a folder of your own: there is no home folder here"
        raise DataError(describe(field, str(path), allowed)) from None


def _read(value: Any) -> Any:
    folder = _folder.get()
    return value if folder is None or not isinstance(value, str) else placed(value, folder)


def _write(value: str) -> str:
    folder = _folder.get()
    return value if folder is None else relative(value, folder)


Place = Annotated[str, BeforeValidator(_read), PlainSerializer(_write, return_type=str)]
"""Where something else lies: a run, a model, a folder of a plan."""
