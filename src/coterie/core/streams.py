"""Progress bars and notes on standard error; if they cannot be written they are dropped."""

from __future__ import annotations

import sys
from typing import Any, TextIO, cast


class Dropping:
    """A text stream that ignores failures to write: a closed terminal, a full disk, a closed pipe.

    All other attributes are those of the stream below.
    """

    def __init__(self, below: TextIO | None) -> None:
        self._below = below

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, what: str, *given: Any) -> None:
        try:
            if self._below is not None:
                getattr(self._below, what)(*given)
        except (OSError, ValueError):  # ValueError: the stream is closed, or has no such letters
            pass

    def __getattr__(self, name: str) -> Any:
        if self._below is None:
            raise AttributeError(name)
        return getattr(self._below, name)


def error_stream() -> TextIO:
    """The current standard error (None in a process without one), for bars and notes."""
    if isinstance(sys.stderr, Dropping):
        return cast(TextIO, sys.stderr)
    return cast(TextIO, Dropping(sys.stderr))
