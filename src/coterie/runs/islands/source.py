"""The samples of one island, or all samples with their island as task."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, SerializeAsAny, model_validator
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.json_reader import parse_json
from coterie.core.paths import Place
from coterie.core.registry import Part
from coterie.data import SOURCES, SourceConfig, SourceInfo, Split, Subset
from coterie.data.source import as_rows
from coterie.runs.islands.partition import (
    Islands,
    PartitionConfig,
    partition_of,
    read_partition,
)


@SOURCES.register
class IslandConfig(SourceConfig):
    """One island of another source, or all samples with their island as ``task``."""

    kind: Literal["island"] = "island"
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    """The other source."""
    partition: PartitionConfig = PartitionConfig()  # how it is divided into islands
    index: NonNegativeInt | None = None  # number of the island; null: all samples
    path: Place | None = None
    """Folder with a partition from ``coterie island plan``; null: it is computed."""
    cut: str = ""  # digest that the partition must have; "": any
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="one island of another source, or all with the island of each sample",
        modality="of its data",
        shape="of its data",
        count="of its data",
        licence="of its data",
    )

    @model_validator(mode="after")
    def _in_range(self) -> IslandConfig:
        if self.index is not None and self.index >= self.partition.islands:
            allowed = f"0..{self.partition.islands - 1}"
            raise ConfigError(describe("index", self.index, allowed))
        if self.data.kind == "island":
            raise ConfigError(describe("data.kind", "island", "a source that is no island"))
        return self

    @property
    def whole(self) -> SourceConfig:
        return self.data  # type: ignore[return-value]

    def islands(self) -> Islands:
        """CheckpointError if the partition is not the one that ``cut`` names."""
        found = _islands(self.data.to_json(), self.partition.to_json(), self.path)
        if self.cut and found.digest != self.cut:
            raise CheckpointError(
                f"partition {self.path or 'drawn here'}: digest {found.digest[:16]} instead of "
                f"{self.cut[:16]}; these samples were cut into other islands"
            )
        return found

    def build(self, split: Split = "train") -> Source:
        islands, whole = self.islands(), self.data.build(split=split)
        assigned = islands.of(split)
        if len(assigned) != len(whole):
            allowed = f"{len(assigned)}, as when it was cut"
            raise ConfigError(describe(f"data.data: {split} samples", len(whole), allowed))
        if self.index is None:
            return Placed(whole, assigned, islands)
        rows = np.flatnonzero(assigned == self.index)
        if not rows.size:
            raise ConfigError(describe("data.index", self.index, f"an island with {split} samples"))
        return Subset(whole, rows)


@lru_cache(maxsize=8)
def _islands(data: str, partition: str, path: str | None) -> Islands:
    """Read once per process: every batch source of a run asks for it."""
    config, source = PartitionConfig.from_json(partition), SOURCES.parse(parse_json(data))
    if path is None:
        return partition_of(source, config)
    return read_partition(Path(path), source, config)


class Placed:
    """A source whose samples know their island; ``place`` puts new ones on theirs."""

    def __init__(self, source: Source, assigned: np.ndarray, islands: Islands) -> None:
        self.source, self.islands = source, islands
        self._assigned = torch.from_numpy(assigned.astype(np.int64))
        self.name, self.modality, self.shape = source.name, source.modality, source.shape
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.licence = source.licence
        self.fingerprint = str(getattr(source, "fingerprint", ""))
        self.task_names = tuple(f"island {index}" for index in range(islands.config.islands))

    def __len__(self) -> int:
        return len(self.source)

    def get(self, indices: Any) -> Batch:
        batch = self.source.get(indices)
        rows = torch.from_numpy(as_rows(indices, len(self), self.name))
        return Batch(batch.x, batch.cond.replace(task=self._assigned[rows]), batch.ids)

    def place(self, x: Tensor) -> np.ndarray | None:
        """Island i64 [B] of new samples; None where the cut does not say (by class, at random)."""
        return None if self.islands.place is None else self.islands.place(x)
