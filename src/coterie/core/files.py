"""Checks before files are opened: special files are refused, and errors are one line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.core.errors import CoterieError, DataError

LONGEST = 300
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular_file(path: Path, error: type[CoterieError] = DataError) -> int:
    """The size in bytes of a regular file; links are followed. ``error`` for anything else (opening
    a named pipe would block for ever)."""
    try:
        found = path.stat()
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read ({reason(problem)})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no regular file")
        raise error(f"{path}: {kind}; allowed: a regular file")
    return found.st_size


@contextmanager
def read_by_library(said: str, error: type[CoterieError] = DataError) -> Iterator[None]:
    """Turn any exception of a library that reads a file into ``error``: ``said``, then the reason
    in brackets. Coterie's own errors pass through."""
    try:
        yield
    except CoterieError:
        raise
    except Exception as problem:
        raise error(f"{said} ({reason(problem)})") from problem


def reason(problem: BaseException) -> str:
    """The message of an exception as one line; its type if it has no message."""
    text = " ".join(str(getattr(problem, "strerror", None) or problem).split())
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return shown or type(problem).__name__


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a file name is valid UTF-8 (operating systems allow any bytes)."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(path: str | os.PathLike[str]) -> str:
    r"""A file name for messages, with bytes that are not UTF-8 as ``\xff``."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def require_utf8(
    path: str | os.PathLike[str], field: str, error: type[CoterieError] = DataError
) -> None:
    """``error`` for a file name that is not UTF-8: configurations and safetensors cannot
    hold it."""
    if not is_utf8(path):
        raise error(
            f"{field}: '{escaped(path)}' is not allowed; allowed: a name in UTF-8; rename it"
        )
