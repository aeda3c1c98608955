"""Errors for people: the field, its value, what is allowed, one hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 200
"""Characters of a value that an error shows."""


class CoterieError(ValueError):
    """Base of every error a user can cause; the command line prints it as one line."""


class ConfigError(CoterieError):
    """A configuration value is unknown, out of range, or does not fit another one."""


class DataError(CoterieError):
    """Data that cannot be read, does not have the promised shape, or is not finite."""


class CheckpointError(CoterieError):
    """A checkpoint or model file is damaged, foreign or incomplete."""


class TrainingError(CoterieError):
    """Training cannot go on (non-finite values, no disk); what was saved is intact."""


def describe(field: str, value: object, allowed: str, hint: str = "") -> str:
    """One line in the house form, e.g. ``router.top_k: 9 is not allowed; allowed: 1..8; hint``."""
    text = f"{field}: {shown(value)} is not allowed; allowed: {allowed}"
    return f"{text}; {hint}" if hint else text


def shown(value: object) -> str:
    """A value in an error: on one line, and short whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        return f"this {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unknown(field: str, value: str, known: Iterable[str]) -> str:
    """Message for a name outside a known set, with the closest match as the hint."""
    names = sorted(known)
    close = difflib.get_close_matches(str(value), names, n=1)
    return describe(field, value, ", ".join(names), f"did you mean {close[0]!r}?" if close else "")
