"""Open tagged unions: parts register their configuration under a ``kind``.

    SCORES = Registry("score", "coterie.scores")

    @SCORES.register
    class LinearScore(Part):
        kind: Literal["linear"] = "linear"
        def build(self, width: int, num_experts: int) -> nn.Module: ...

    class RouterConfig(Config):      # any registered kind, JSON round trip safe
        score: Annotated[SerializeAsAny[Part], SCORES.validator] = LinearScore()

Third parties add kinds through package entry points of the registry's group.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BeforeValidator

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe, unknown


class Part(Config):
    """A configuration with a ``kind``; its ``build`` makes the object that it configures.

    The arguments of ``build`` are those of the registry: a router score gets the width and the
    number of experts.
    """

    kind: str

    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} declares no build()")

    if TYPE_CHECKING:  # which fields there are depends on the kind

        def __getattr__(self, name: str) -> Any: ...


PartT = TypeVar("PartT", bound=Part)


class Registry:
    """Maps each ``kind`` to the configuration class of a part."""

    def __init__(self, name: str, group: str | None = None) -> None:
        self.name = name
        self.group = group
        self._parts: dict[str, type[Part]] = {}
        self._scanned = False
        self._broken: list[str] = []
        self.validator = BeforeValidator(self.parse)

    def register(self, cls: type[PartT]) -> type[PartT]:
        """Class decorator: add ``cls`` under the default of its field ``kind``."""
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__}.kind needs a literal default")
        if self._parts.setdefault(kind, cls) is not cls:
            raise ValueError(f"{self.name} kind {kind!r} is registered twice")
        return cls

    def kinds(self) -> list[str]:
        """Every known kind, those of installed packages included."""
        self._scan()
        return sorted(self._parts)

    def get(self, kind: str) -> type[Part]:
        """The class of a kind. ConfigError for an unknown kind, with the most similar one."""
        self._scan()
        if kind not in self._parts:
            why = unknown("kind", kind, self._parts)
            left_out = "; ".join(self._broken)
            raise ConfigError(f"{why}; left out: {left_out}" if left_out else why)
        return self._parts[kind]

    def parse(self, value: Any) -> Part:
        """A part from a part, a mapping with ``kind``, or the name of a kind (default fields)."""
        if isinstance(value, Part):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ConfigError(describe("kind", value, f"an object with kind: {self.kinds()}"))
        return self.get(str(value["kind"])).from_dict(value)

    def _scan(self) -> None:
        if self._scanned or self.group is None:
            return
        self._scanned = True
        for entry in importlib.metadata.entry_points(group=self.group):
            try:
                entry.load()
            except Exception as error:  # whatever a package of others does when it is imported
                package = entry.dist.name if entry.dist is not None else "of an unknown package"
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                self._broken.append(f"{package} ({entry.value}): {why}")
                warnings.warn(
                    f"plug-in {entry.name!r} of {package} is left out: {entry.value} cannot be "
                    f"imported ({why})",
                    stacklevel=3,
                )
