"""Some classes of another source, for a base model or for one new concept."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, SerializeAsAny, model_validator

from coterie.core.batch import Source
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, Subset

READ = 512  # samples read at a time


@SOURCES.register
class ClassesConfig(SourceConfig):
    """Some classes of another source."""

    kind: Literal["classes"] = "classes"
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    """The other source."""
    classes: tuple[NonNegativeInt, ...] = (0, 1, 2, 3, 4, 5)
    """numbers of the classes that are kept; they keep their numbers"""
    count: PositiveInt | None = None  # training samples of each class, the first ones; null: all
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="some classes of another source",
        modality="of its data",
        shape="of its data",
        count="of its data",
        licence="of its data",
    )

    @model_validator(mode="after")
    def _check(self) -> ClassesConfig:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(describe("classes", self.classes, "classes that all differ"))
        return self

    @property
    def whole(self) -> SourceConfig:
        return self.data  # type: ignore[return-value]

    def build(self, split: Split = "train") -> Classes:
        source: Source = self.data.build(split=split)
        for number in self.classes:
            if number >= source.num_classes:
                hint = f"source {source.name!r} has {source.num_classes} classes"
                raise ConfigError(describe("data.classes", number, "a class of the data", hint))
        return Classes(source, self.classes, self.count if split == "train" else None)


class Classes(Subset):
    """Knows which ``classes`` occur; ``num_classes`` and names stay those of the whole source."""

    def __init__(self, source: Source, classes: tuple[int, ...], count: int | None) -> None:
        labels = labels_of(source)
        rows = [np.flatnonzero(labels == number)[:count] for number in classes]
        super().__init__(source, np.sort(np.concatenate(rows)))
        self.classes = classes


def labels_of(source: Source) -> np.ndarray:
    """i64 [S]: the class of every sample."""
    parts: list[Any] = []
    for first in range(0, len(source), READ):
        batch = source.get(np.arange(first, min(first + READ, len(source))))
        assert batch.cond.label is not None
        parts.append(batch.cond.label.numpy())
    found: np.ndarray = np.concatenate(parts)
    return found
