"""What a field of a configuration takes, its default and what it means, in words for a table."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from coterie.core.config import Config
from coterie.core.registry import Part, Registry

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
SEQUENCES = (tuple, list, set, frozenset)
LONGEST = 60
"""Characters of a default; a longer one is told by its type alone."""


def registry_of(metadata: Sequence[Any]) -> Registry | None:
    """The registry whose parts a field takes."""
    for item in metadata:
        owner = getattr(getattr(item, "func", None), "__self__", None)
        if isinstance(item, BeforeValidator) and isinstance(owner, Registry):
            return owner
    return None


def bounds(metadata: Sequence[Any]) -> str:
    """``> 0, ≤ 1`` of the limits among the metadata."""
    found = [
        f"{sign} {getattr(item, name):g}"
        for item in metadata
        for name, sign in BOUNDS.items()
        # Limits of 2**31 and more only keep a number within what the machine counts with.
        if abs(getattr(item, name, 2**31)) < 2**31
    ]
    return ", ".join(found)


def type_words(annotation: Any, metadata: Sequence[Any], links: Mapping[str, str]) -> str:
    """A type in words; ``links`` gives the page of a registry by its name."""
    registry = registry_of(metadata)
    if registry is not None:
        return f"[{registry.name}]({links[registry.name]})"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(args[0], [*args[1:], *metadata], links)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        inner = [type_words(one, metadata, links) for one in args if one is not NoneType]
        return " or ".join([*inner, *(["`None`"] if NoneType in args else [])])
    if origin in SEQUENCES or annotation in SEQUENCES:
        inner = [type_words(one, (), links) for one in args if one is not Ellipsis]
        if Ellipsis in args or origin is not tuple:
            return f"list of {inner[0]}" if inner else "list"
        return f"({', '.join(inner)})"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of {' to '.join(type_words(one, (), links) for one in args)}"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return f"`{annotation.__name__}`"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{annotation.__name__}](configuration.md#{annotation.__name__.lower()})"
    name = "any" if annotation is Any else getattr(annotation, "__name__", str(annotation))
    return f"{name} {bounds(metadata)}".strip()


def default_words(field: FieldInfo) -> str:
    """The default as a configuration would give it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Part):
        return f"`{value.kind}`"
    if isinstance(value, BaseModel):
        return f"`{type(value).__name__}`"
    if value is None:
        return "`None`"
    if value == "":
        return "empty"
    said = "[]" if value == () else str(list(value) if isinstance(value, tuple) else value)
    return f"`{said}`" if len(said) <= LONGEST else "see the source"


@cache
def meanings(cls: type[Config]) -> dict[str, str]:
    """Field -> what its class says of it: the comment on its line, or the text below it."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if owner not in (Config, Part) and issubclass(owner, Config):
            found |= dict(_said(owner))
    return found


def _said(cls: type[Config]) -> Iterator[tuple[str, str]]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
        and not token.line.lstrip().startswith("#")
        and not token.string.startswith(("# type:", "# noqa"))
    }
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = next((comments[line] for line in _lines(node) if line in comments), "")
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = inspect.cleandoc(str(after.value.value))
        if text:
            yield node.target.id, " ".join(text.split())


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def table(cls: type[Config], links: Mapping[str, str]) -> str:
    """The fields of a configuration as a table; a sentence where it has none."""
    rows = []
    for name, field in cls.model_fields.items():
        if name != "kind":
            words = type_words(field.annotation, field.metadata, links)
            said = meanings(cls).get(name, "")
            rows.append([f"`{name}`", words, default_words(field), said])
    if not rows:
        return "No fields."
    wide = 4 if any(row[3] for row in rows) else 3
    head = ["field", "takes", "default", "meaning"]
    lines = [head[:wide], ["---"] * wide, *(row[:wide] for row in rows)]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
