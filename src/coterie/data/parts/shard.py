"""The samples of one island in a sealed folder, for a machine without the rest of the data.

``train.safetensors`` and ``held_out.safetensors`` hold ``x`` [S, ...], ``ids`` [S] of the whole
source, and ``label`` [S].
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.errors import CheckpointError, DataError, describe
from coterie.core.folder import atomic_folder, digest, read_manifest, seal, verify_file
from coterie.core.paths import Place, expanded
from coterie.core.prediction import Condition
from coterie.core.tensors import read_tensors, write_tensors
from coterie.data.source import SOURCES, SPLITS, SourceConfig, SourceInfo, Split, as_rows

FORMAT, VERSION = "coterie-shard", 1
READ = 512  # samples read at a time


def write_shard(sources: dict[Split, Source], target: Path) -> Path:
    """Write both splits of a source. DataError where samples have more than a label to them."""
    train, hashes = sources["train"], {}
    with atomic_folder(target, overwrite=True) as work:
        for split, source in sources.items():
            tensors = _tensors(source)
            write_tensors(work / f"{split}.safetensors", tensors)
            hashes[split] = ids_digest(tensors["ids"])
        header: dict[str, Any] = {
            "name": train.name,
            "modality": train.modality,
            "shape": list(train.shape),
            "class_names": list(train.class_names),
            "licence": train.licence,
            "sha256": hashes["train"],
        }
        seal(work, {"format": FORMAT, "version": VERSION, **header})
    return target


def ids_digest(ids: Tensor) -> str:
    """SHA-256 over little-endian i64 bytes, as of a :class:`coterie.data.parts.partition.Shard`."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _tensors(source: Source) -> dict[str, Tensor]:
    parts = [
        source.get(np.arange(first, min(first + READ, len(source))))
        for first in range(0, len(source), READ)
    ]
    conditions = [part.cond.tensors() for part in parts]
    further = {name for found in conditions for name in found} - {"label"}
    if further:
        allowed = "a label, or nothing"
        raise DataError(describe(f"{source.name}: condition", ", ".join(sorted(further)), allowed))
    out = {"x": torch.cat([part.x for part in parts]), "ids": torch.cat([p.ids for p in parts])}
    if conditions and "label" in conditions[0]:
        out["label"] = torch.cat([found["label"] for found in conditions])
    return out


@SOURCES.register
class ShardConfig(SourceConfig):
    """A folder written by ``coterie island plan --export``."""

    kind: Literal["shard"] = "shard"
    path: Place  # the folder
    sha256: str = ""  # required hash of the ids of its training samples; "": any
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="one island's samples in a folder of their own",
        modality="of its data",
        shape="of its data",
        count="of its data",
        licence="of its data",
    )

    def build(self, split: Split = "train") -> ShardSource:
        folder = expanded(self.path, "data.path")
        try:
            manifest = read_manifest(folder, FORMAT, VERSION)
            for name in SPLITS:
                verify_file(folder, f"{name}.safetensors", manifest)
        except CheckpointError as error:
            raise DataError(describe("data.path", self.path, "a whole shard", str(error))) from None
        if self.sha256 and manifest["sha256"] != self.sha256:
            raise DataError(describe("data.path", self.path, f"shard {self.sha256[:16]}..."))
        return ShardSource(read_tensors(folder / f"{split}.safetensors"), manifest)


class ShardSource:
    """In memory; ``ids`` are those of the source it was cut from."""

    def __init__(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self._tensors = tensors
        self.name, self.modality = str(header["name"]), str(header["modality"])
        self.shape = tuple(header["shape"])
        self.class_names = tuple(header["class_names"])
        self.num_classes, self.licence = len(self.class_names), str(header["licence"])
        self.fingerprint = digest(header["files"])

    def __len__(self) -> int:
        return len(self._tensors["ids"])

    def get(self, indices: Any) -> Batch:
        rows = torch.from_numpy(as_rows(indices, len(self), self.name))
        label = self._tensors.get("label")
        return Batch(
            x=self._tensors["x"][rows],
            cond=Condition(label=None if label is None else label[rows]),
            ids=self._tensors["ids"][rows],
        )
