"""Which values count as numbers in a configuration, and bounds for fields that state none.

``true`` and ``"3"`` are not numbers (text becomes a number only on the command line,
:func:`coterie.core.config.override`). The general bounds keep every value from overflowing a
tensor's size or a float32. Memory is checked elsewhere (:mod:`coterie.core.memory`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from pydantic_core import PydanticCustomError, core_schema

from coterie.core.errors import ConfigError, describe

SIZE = 2**24
"""Largest integer where a field says nothing: a dimension of a tensor, a number of samples."""

LARGEST = 1e30
"""Largest magnitude of a float where a field says nothing: its square root fits every formula."""

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Total = Annotated[int, Field(ge=0, lt=2**63)]
"""Parameters, bytes, steps done."""

Period = Annotated[int, Field(ge=1, lt=2**63)]
"""Every so many steps; a number that never comes is a way to say never."""

Few = Annotated[int, Field(ge=1, le=4096)]
"""Parts that are made one by one: layers, rounds, passes."""


def inner_size(ratio: float, width: int, field: str = "ratio") -> int:
    """``field`` (a ratio) times the width, rounded; ConfigError if the result is too large for a
    tensor."""
    size = round(ratio * width)
    if not 1 <= size <= SIZE:
        allowed = f"a ratio that makes an inner size of 1..{SIZE} of the width {width}"
        raise ConfigError(describe(field, ratio, allowed))
    return size


def bounded(schema: Any) -> Any:
    """Add strict types and general bounds to the numbers of a pydantic schema, in place."""
    if isinstance(schema, list | tuple):
        for item in schema:
            bounded(item)
    elif isinstance(schema, dict):
        for key, node in schema.items():
            if key == "metadata":
                continue
            schema[key] = _exact(node)
            bounded(node)
            if isinstance(node, list):
                node[:] = [_exact(item) for item in node]
        if schema.get("type") == "bool":
            schema["strict"] = True
    return schema


def _exact(node: Any) -> Any:
    """A node of numbers so that it takes nothing else; any other node as it is."""
    if not isinstance(node, dict):
        return node
    if node.get("type") in ("int", "float") and "strict" not in node:
        return _number(node)
    # Where some numbers are listed, true equals 1 and would be taken for it.
    listed = node.get("expected", ()) if node.get("type") == "literal" else ()
    if listed and all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        return core_schema.no_info_before_validator_function(_only_numbers, node)
    return node


def _number(node: dict[str, Any]) -> Any:
    largest = SIZE if node["type"] == "int" else LARGEST
    if "le" not in node and "lt" not in node:
        node["le"] = largest
    if "ge" not in node and "gt" not in node:
        node["ge"] = -largest
    node["strict"] = False  # seen; what pydantic would take beside numbers is refused below
    return core_schema.no_info_before_validator_function(_only_numbers, node)


def _only_numbers(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("not_a_number", "a number is wanted")
    return value
