"""Base of data sources: finite, indexable, with fixed and disjoint splits.

A source's ``kind`` is its name; ``SourceConfig.build(split)`` makes one split. Splits that the data
do not define depend on the source's name or on a hash of each document's key, never on a training
seed: a held-out sample is held out in every run.

Shape legend: B batch, S samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.registry import Part, Registry
from coterie.data.arrays import native
from coterie.data.ordering import permutation

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

SOURCES = Registry("source", "coterie.sources")


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a source that are known before it is downloaded."""

    summary: str
    modality: str  # "image", "text", "vector", "points", "weights"
    shape: str  # of one sample, as text: some depend on the configuration
    count: str  # train + held out, as text
    licence: str


class SourceConfig(Part):
    """Base of all source configurations."""

    info: ClassVar[SourceInfo]

    @property
    def whole(self) -> SourceConfig:
        """The source that this one is a part of; itself if it is no part."""
        return self

    def build(self, split: Split = "train") -> Source:
        """One split of the source, "train" or "held_out"."""
        raise NotImplementedError

    def explain_classes(self, source: Source) -> str:
        """Where the number of classes of ``source`` comes from, for an error message."""
        return f"source {source.name!r} has {source.num_classes} classes"


def identity(source: Source) -> dict[str, Any]:
    """Number, classes and a digest of the samples, which must be equal when a run is resumed."""
    return {
        "samples": len(source),
        "classes": list(source.class_names),
        "fingerprint": str(getattr(source, "fingerprint", "")),
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences between two identities as text; "" if there are none."""
    if before.get("samples") != now["samples"]:
        return f"{before.get('samples')} samples then, {now['samples']} now"
    gone = [name for name in before.get("classes", ()) if name not in now["classes"]]
    new = [name for name in now["classes"] if name not in before.get("classes", ())]
    if gone or new or before.get("classes") != now["classes"]:
        return f"classes gone: {', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'}"
    if before.get("fingerprint") != now["fingerprint"]:
        return "files or values are others than then, as many as before"
    return ""


def build_source(config: Any, split: Split = "train") -> Source:
    """Build from a :class:`SourceConfig`, a mapping with ``kind``, or a bare kind name."""
    part = SOURCES.parse(config)
    check_split(split)
    return part.build(split)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError(describe("split", split, " or ".join(SPLITS)))


def split_rows(name: str, size: int, split: Split, share: float = 0.2) -> np.ndarray:
    """Rows i64 of one split of ``size`` samples; a function of ``name`` and ``size`` alone."""
    check_split(split)
    rows = permutation(0, ("split", name), size)
    cut = max(1, round(share * size)) if size > 1 else 0
    return np.sort(rows[:cut] if split == "held_out" else rows[cut:])


def is_held_out(key: str, one_in: int = 10) -> bool:
    """Whether the document ``key`` is held out: about one in ``one_in`` is."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % one_in == 0


def as_rows(indices: Any, size: int, name: str) -> np.ndarray:
    """Check ``indices`` (1-D integers in 0..size-1) and return them as i64."""
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        found = f"{rows.dtype} of shape {rows.shape}"
        raise DataError(describe(f"{name}.get(indices)", found, "a 1-D integer array"))
    rows = rows.astype(np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= size):
        wrong = int(rows[(rows < 0) | (rows >= size)][0])
        raise DataError(describe(f"{name}.get(indices)", wrong, f"0..{size - 1}"))
    return rows


def require_finite(values: Tensor, name: str, indices: np.ndarray) -> None:
    """Raise DataError naming the first sample of ``values`` [B, ...] that is not finite."""
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bool(bad.any()):
        index = int(indices[int(torch.nonzero(bad)[0])])
        raise DataError(f"{name}: sample {index} holds NaN or infinity; clean or drop it")


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """Class ids as i64 [S]; DataError naming the first one outside 0..num_classes-1."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise DataError(describe(f"{name}: labels", found, "a 1-D integer array"))
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        index = int(wrong[0])
        field = f"{name}: class id of sample {index}"
        raise DataError(describe(field, int(labels[index]), f"0..{num_classes - 1}"))
    return labels.astype(np.int64)


class Rows(Protocol):
    """Anything indexed like the first axis of an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


class ArraySource:
    """Samples that lie in one array: in memory, memory-mapped, or decoded when read.

    ``data`` is [T, ...]; ``rows`` picks the S samples of this split (None: all). ``transform``
    maps the gathered values [B, ...] to model input. ``labels``, ``tasks`` and ``captions`` have
    length S. ``fingerprint``: a digest of data that may change under their path ("": they cannot).
    """

    def __init__(
        self,
        name: str,
        modality: str,
        data: Rows,
        *,
        shape: Sequence[int],
        licence: str,
        rows: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] = (),
        tasks: np.ndarray | None = None,
        task_names: Sequence[str] = (),
        captions: Sequence[str] = (),
        transform: Callable[[Tensor], Tensor] | None = None,
        fingerprint: str = "",
    ) -> None:
        self.fingerprint = fingerprint
        self.name, self.modality, self.licence = name, modality, licence
        self.shape = tuple(shape)
        self.class_names, self.task_names = tuple(class_names), tuple(task_names)
        self.num_classes = len(self.class_names)
        self.captions = tuple(captions)
        self._data, self._rows, self._transform = data, rows, transform
        lengths = {"labels": labels, "tasks": tasks, "captions": captions or None}
        for field, values in lengths.items():
            if values is not None and len(values) != len(self):
                raise DataError(describe(f"{name}: {field}", len(values), f"{len(self)} entries"))
        self._labels = None if labels is None else check_labels(labels, len(class_names), name)
        self._tasks = None if tasks is None else check_labels(tasks, len(task_names), name)

    def __len__(self) -> int:
        return len(self._data) if self._rows is None else len(self._rows)

    def get(self, indices: Any) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        values = self._data[rows if self._rows is None else self._rows[rows]]
        x = torch.from_numpy(np.ascontiguousarray(native(values)))
        if self._transform is not None:
            x = self._transform(x)
        require_finite(x, self.name, rows)
        return Batch(
            x=x,
            cond=Condition(label=_pick(self._labels, rows), task=_pick(self._tasks, rows)),
            ids=torch.from_numpy(rows),
        )


def _pick(values: np.ndarray | None, rows: np.ndarray) -> Tensor | None:
    return None if values is None else torch.from_numpy(values[rows])


class Subset:
    """Some samples of a source, such as an island's shard; ``ids`` stay those of the whole
    source."""

    def __init__(self, source: Source, indices: Any) -> None:
        self.source = source
        self.indices = as_rows(indices, len(source), source.name)
        self.name, self.modality, self.shape = source.name, source.modality, source.shape
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.task_names: tuple[str, ...] = getattr(source, "task_names", ())
        self.licence = source.licence
        self.fingerprint = str(getattr(source, "fingerprint", ""))

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, indices: Any) -> Batch:
        return self.source.get(self.indices[as_rows(indices, len(self), self.name)])
