"""Typed, frozen, validated configuration; JSON is its serialisation.

A configuration is a tree of :class:`Config`. A command-line flag is a path into it
(``model.backbone.depth=4``), applied by :func:`override` and validated like any other value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError

from coterie.core.errors import ConfigError, describe, shown, unknown
from coterie.core.json_reader import literal, parse_json, read_object
from coterie.core.numbers import bounded
from coterie.core.paths import beside

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Made(ModelMetaclass):
    """Errors in the house form also where a configuration is made in code."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None


class Config(BaseModel, metaclass=_Made):
    """Base of all configurations: frozen and validated.

    Unknown keys are an error. So are numbers that are not finite, out of bounds, or of another type
    than the field's (:mod:`coterie.core.numbers`).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return bounded(handler(source))

    def to_json(self) -> str:
        """Serialise with sorted keys; ``from_json`` gives an equal object back."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A configuration from ``data``. ConfigError lists every problem, one clause each."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None
        except RecursionError:
            hint = "nothing here is that deep"
            raise ConfigError(describe(cls.__name__, data, "fewer levels", hint)) from None

    @classmethod
    def from_json(cls, text: str, origin: str = "configuration") -> Self:
        """Parse JSON text; ``origin`` names the file in errors."""
        data = parse_json(text, origin)
        if not isinstance(data, dict):
            raise ConfigError(describe(origin, type(data).__name__, "a JSON object"))
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file. ConfigError if there is none, or if it is not valid."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(describe("config file", str(path), "an existing file"))
        data = read_object(path, error=ConfigError)
        try:
            with beside(path.parent):
                return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed (pydantic's ``model_copy`` does not
        validate)."""
        data = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).from_dict({**data, **changes})


ConfigT = TypeVar("ConfigT", bound=Config)


def explain(error: ValidationError, cls: type[Any]) -> str:
    """One clause ``field: value ...`` per problem of a pydantic error."""
    clauses = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or cls.__name__
        if item["type"] == "extra_forbidden":
            owner = _fields_at(cls, item["loc"][:-1])
            clauses.append(
                unknown(path, str(item["loc"][-1]), owner) if owner else f"{path}: unknown field"
            )
        elif item["type"] == "value_error":
            # Validators name fields relative to their own configuration; prepend where it sits.
            message = str(item["ctx"]["error"])
            clauses.append(f"{path}.{message}" if item["loc"] else message)
        elif item["type"] == "missing":
            clauses.append(f"{path}: missing, and it has no default")
        else:
            clauses.append(f"{path}: {shown(item['input'])} is not allowed; {item['msg'].lower()}")
    return " | ".join(clauses)


def _fields_at(cls: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """Names of the fields of the config class found by walking ``path``; [] if a union of several
    hides it."""
    current: Any = cls
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        current = getattr(field, "annotation", None)
        classes = [one for one in get_args(current) if hasattr(one, "model_fields")]
        current = classes[0] if len(classes) == 1 else current
    return list(getattr(current, "model_fields", {}))


def override(config: ConfigT, assignments: Mapping[str, Any]) -> ConfigT:
    """Apply ``{"a.b.0.c": value}`` to a configuration and validate the result.

    String values are read as JSON where they parse (``3``, ``true``, ``null``, ``[1, 2]``), else
    kept as strings. A path into an optional object that is null creates that object. An unknown
    path is a ConfigError that lists the fields which exist there.
    """
    data = config.model_dump(mode="json")
    for path, value in assignments.items():
        _assign(data, path, literal(value, path) if isinstance(value, str) else value)
    return type(config).from_dict(data)


class _New(dict[str, Any]):
    """An object that a path has made: which fields it may have, validation says."""


def _assign(data: Any, path: str, value: Any) -> None:
    parts = path.split(".")
    here = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                allowed = f"an index 0..{len(here) - 1}" if here else "nothing: the list is empty"
                raise ConfigError(describe(path, part, allowed))
            key: Any = int(part)
        elif isinstance(here, dict):
            if part not in here and not isinstance(here, _New):
                raise ConfigError(unknown(path, part, here))
            key = part
        else:
            raise ConfigError(f"{path}: {'.'.join(parts[:depth])} has no fields")
        if last:
            here[key] = value
        else:
            if (here[key] if isinstance(here, list) else here.get(key)) is None:
                here[key] = _New()
            here = here[key]
