"""Paths in files are relative to the file that holds them, so that a tree can be moved whole.

In memory a path is what it is everywhere: absolute, or relative to the present folder. Only while a
configuration is written or read :func:`beside` a folder, its :data:`Place` fields change form.
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
    """Inside, configurations are those of a file in ``folder``, which is read or written."""
    token = _folder.set(Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def placed(text: str, folder: str | Path) -> str:
    """A path from a file in ``folder``, as it is in memory; absolute, for no folder is present
    to those who read a file."""
    if os.path.isabs(text) or text.startswith("~"):
        return text
    return os.path.realpath(os.path.join(folder, text))


def relative(text: str, folder: str | Path) -> str:
    """A path for a file in ``folder``. What shares nothing with it but the root stays absolute:
    nobody moves both together."""
    if text.startswith("~"):
        return text
    there, here = os.path.realpath(text), os.path.realpath(folder)
    together = os.path.commonpath([there, here])
    return there if together == os.path.dirname(together) else os.path.relpath(there, here)


def expanded(path: str | Path, field: str) -> Path:
    """``path`` with ``~`` as the folder that it stands for; DataError where there is none."""
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
