"""Errors that a user can cause: each message names the field, its value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 200
"""Characters of a value that an error shows."""


class CoterieError(ValueError):
    """Base of all errors that a user can cause; the command line prints them as one line."""


class ConfigError(CoterieError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class DataError(CoterieError):
    """Data cannot be read, have another shape than expected, or are not finite."""


class CheckpointError(CoterieError):
    """A checkpoint or model file is damaged, incomplete or of another format."""


class TrainingError(CoterieError):
    """Training cannot go on (non-finite values, no disk space). Saved files are intact."""


def describe(field: str, value: object, allowed: str, hint: str = "") -> str:
    """The message of an error: ``router.top_k: 9 is not allowed; allowed: 1..8; hint``."""
    text = f"{field}: {shown(value)} is not allowed; allowed: {allowed}"
    return f"{text}; {hint}" if hint else text


def shown(value: object) -> str:
    """A value as it appears in an error message: on one line, shortened if long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        return f"this {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unknown(field: str, value: str, known: Iterable[str]) -> str:
    """Message for a name that is not among ``known``; the hint is the most similar known name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(value), names, n=1)
    return describe(field, value, ", ".join(names), f"did you mean {close[0]!r}?" if close else "")
