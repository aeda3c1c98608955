"""Reading JSON files and flags, with limits and one-line errors.

All JSON is read here, so that every command refuses the same: encodings other than UTF-8, very
large files, numbers with thousands of digits, and nesting too deep for Python's stack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coterie.core.errors import CheckpointError, ConfigError, CoterieError, describe

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Of a whole number. Some tokenizers say 10^30 for "no limit"; nothing needs more."""


class _Refused(ValueError):
    """Valid JSON that is not taken; where a word may stand for itself, this one may not."""


def parse_json(
    text: str | bytes, where: str = "text", error: type[CoterieError] = ConfigError
) -> Any:
    """The value of JSON text (bytes: UTF-8); ``error`` names ``where``."""
    try:
        return _parse(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({_short(problem)})") from None


def literal(text: str, where: str = "value") -> Any:
    """The value of a command-line flag: JSON if it parses, else the text itself."""
    try:
        return _parse(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as problem:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ConfigError(describe(where, shown, f"a word or JSON ({_short(problem)})")) from None


def read_json(path: Path, missing: str = "", error: type[CoterieError] = CheckpointError) -> Any:
    """The value of a JSON file. ``error`` if the file does not exist (``missing``: what that
    means), cannot be read or is not JSON."""
    try:
        if not path.is_file():  # a folder, a pipe or a device neither ends nor tells its size
            raise error(f"{path}: missing" + (f"; {missing}" if missing else ""))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if len(data) > MAX_BYTES:
        raise error(f"{path}: larger than {MAX_BYTES} bytes; no JSON file here is")
    return parse_json(data, str(path), error)


def read_object(
    path: Path, missing: str = "", error: type[CoterieError] = CheckpointError
) -> dict[str, Any]:
    """As :func:`read_json`, for files that hold a JSON object."""
    data = read_json(path, missing, error)
    if not isinstance(data, dict):
        raise error(f"{path}: not a JSON object")
    return data


def _parse(text: str | bytes) -> Any:
    if len(text) > MAX_BYTES:
        raise _Refused(f"longer than {MAX_BYTES} bytes")
    # By hand, for the module would guess at UTF-16 from the first bytes.
    data = json.loads(text.decode() if isinstance(text, bytes) else text, parse_int=_whole)
    _check(data)
    return data


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _check(data: Any) -> None:
    """Level by level, not by recursion: the tree may be deeper than the stack."""
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                below += item
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                item.encode()  # half of a surrogate pair is no text, and cannot be written again
        level = below


def _short(problem: Exception) -> str:
    return "nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:200]
