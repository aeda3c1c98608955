"""Division of a data set into islands: by clusters of frozen features, by class, or at random.

A partition depends on the data and the configuration only. It is kept in the user's cache, and a
plan carries a copy with its hash, so that experts trained in different places use the same one
(Decentralized Diffusion Models, McAllister et al. 2025).

Legend: S samples of a split, D feature dimensions, F fine centres, K islands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from coterie.core.batch import Source
from coterie.core.config import Config
from coterie.core.errors import CheckpointError, ConfigError, DataError, describe
from coterie.core.folder import digest
from coterie.core.numbers import Few
from coterie.core.registry import Part
from coterie.core.rng import numpy_generator
from coterie.core.user_cache import cache_root
from coterie.data import Compaction, Partition, kmeans_partition, order, shards_of
from coterie.data.download.cache import (
    locked,
    open_array,
    problem,
    save_array,
    write_folder,
)
from coterie.data.source import SPLITS, Split, identity

ARRAYS = ("centers", "groups", "mean", "axes")
READ = 512  # samples read at a time


class PartitionConfig(Config):
    """How a data set is divided into islands."""

    islands: Few = 4  # number of islands
    by: Literal["features", "labels", "random"] = "features"
    """Two-stage k-means over features of a frozen network (over the values themselves for vectors),
    whole classes, or at random."""
    seed: int = Field(0, ge=0, lt=2**63)  # of k-means and of the random division
    dims: int = Field(64, ge=1)  # principal components of the features
    samples: int = Field(20_000, ge=1)
    """training samples for k-means; the others join the nearest centre"""


@dataclass(frozen=True, eq=False)
class Islands:
    """The island i64 [S] of every sample of both splits; ``sha256[k]`` is of the indices of
    island k's training samples. ``place`` puts new samples f32 [B, ...] on islands."""

    config: PartitionConfig
    train: np.ndarray
    held_out: np.ndarray
    place: Callable[[Tensor], np.ndarray] | None

    def of(self, split: Split) -> np.ndarray:
        return self.train if split == "train" else self.held_out

    @property
    def counts(self) -> np.ndarray:
        """Training samples of each island, i64 [K]."""
        return np.bincount(self.train, minlength=self.config.islands)

    @property
    def prior(self) -> np.ndarray:
        """Each island's share of the training split, f64 [K]."""
        return self.counts / len(self.train)

    @property
    def sha256(self) -> tuple[str, ...]:
        return tuple(shard.sha256 for shard in shards_of(self.train, self.config.islands))

    @property
    def digest(self) -> str:
        """Of the whole cut: experts of one system agree on it."""
        return digest([self.config.model_dump(mode="json"), list(self.sha256)])


def partition_of(data: Part, config: PartitionConfig) -> Islands:
    """The partition of ``data``, drawn now or taken from the cache.

    DataError if there are fewer distinct samples than islands; ConfigError if the data have no
    such features or labels.
    """
    return read_partition(_drawn(data, config), data, config)


def copy_partition(data: Part, config: PartitionConfig, target: Path) -> Islands:
    """Write the partition into a folder of its own, for machines that shall not draw it again.

    CheckpointError if another one is there.
    """
    kept, islands = _drawn(data, config), partition_of(data, config)
    if not target.exists():
        arrays = [path for path in kept.iterdir() if path.suffix == ".npy"]
        write_folder(target, lambda work: _copy(arrays, work))
    elif read_partition(target, data, config).digest != islands.digest:
        raise CheckpointError(f"{target}: holds another partition; choose another folder")
    return islands


def _drawn(data: Part, config: PartitionConfig) -> Path:
    """The folder in the cache, of these very samples: pictures may have changed under their path.
    A second process waits for the first to draw it."""
    seen = [identity(data.build(split=split)) for split in SPLITS]
    key = digest([data.model_dump(mode="json"), config.model_dump(mode="json"), seen])
    folder = cache_root() / "partitions" / f"{data.kind}-{key[:32]}"
    with locked(folder.with_suffix(".lock")):
        if problem(folder, deep=True) is not None:
            arrays = _draw(data, config)
            write_folder(folder, lambda work: _save(work, arrays))
    return folder


def read_partition(folder: Path, data: Part, config: PartitionConfig) -> Islands:
    """A partition as :func:`copy_partition` wrote it; CheckpointError if it is damaged."""
    why = problem(folder, deep=True)
    if why is not None:
        raise CheckpointError(f"partition {folder}: {why}")
    cut = {split: np.array(open_array(folder, split)) for split in SPLITS}
    place = None
    if (folder / "centers.npy").is_file():
        kept = {name: np.array(open_array(folder, name)) for name in ARRAYS}
        compaction = Compaction(kept["mean"], kept["axes"])
        place = _placer(data, compaction, Partition((), kept["centers"], kept["groups"]))
    return Islands(config, cut["train"], cut["held_out"], place)


def _copy(files: list[Path], folder: Path) -> None:
    for path in files:
        shutil.copy(path, folder)


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        save_array(folder, name, values)


def _draw(data: Part, config: PartitionConfig) -> dict[str, np.ndarray]:
    sources: dict[Split, Source] = {split: data.build(split=split) for split in SPLITS}
    size = len(sources["train"])
    if config.islands > size:
        raise ConfigError(describe("partition.islands", config.islands, f"1..{size}"))
    if config.by == "random":
        return {
            split: numpy_generator(config.seed, "islands", split).integers(
                0, config.islands, len(source)
            )
            for split, source in sources.items()
        }
    if config.by == "labels":
        return {split: _by_label(source, config) for split, source in sources.items()}
    return _by_features(data, sources, config)


def _by_label(source: Source, config: PartitionConfig) -> np.ndarray:
    """Whole classes, as many to each island as to any other."""
    classes = source.num_classes
    if classes < config.islands:
        allowed = f"at most the {classes} classes of {source.name!r}"
        raise ConfigError(describe("partition.islands", config.islands, allowed))
    labels = _read(source, lambda batch: batch.cond.label.numpy(), len(source))
    return labels * config.islands // classes


def _by_features(
    data: Part, sources: dict[Split, Source], config: PartitionConfig
) -> dict[str, np.ndarray]:
    extract = _features(data)
    train = sources["train"]
    rows = order(config.seed, 0, min(config.samples, len(train)), len(train))
    seen = _read(train, lambda batch: extract(batch.x), len(rows), np.sort(rows))
    compaction = Compaction.fit(seen, config.dims)
    cut = kmeans_partition(compaction(seen), config.islands, config.seed)
    out: dict[str, np.ndarray] = {
        split: _read(source, lambda batch: cut.assign(compaction(extract(batch.x))), len(source))
        for split, source in sources.items()
    }
    empty = np.flatnonzero(np.bincount(out["train"], minlength=config.islands) == 0)
    if empty.size:
        raise DataError(f"partition: island {int(empty[0])} is empty; use fewer islands")
    return {
        **out,
        "centers": cut.centers,
        "groups": cut.groups,
        "mean": compaction.mean,
        "axes": compaction.axes,
    }


def _features(data: Part) -> Callable[[Tensor], np.ndarray]:
    source: Source = data.build(split="train")
    if source.modality == "vector":
        return lambda x: x.flatten(1).float().numpy()
    if source.modality == "image":
        from coterie.runs.feature_networks import feature_network

        return feature_network(data)
    allowed = "data of image, vector, or by: labels, random"
    raise ConfigError(describe("partition.by", f"features of {source.modality}", allowed))


def _placer(
    data: Part, compaction: Compaction, partition: Partition
) -> Callable[[Tensor], np.ndarray]:
    def place(x: Tensor) -> np.ndarray:
        extract = _features(data)
        parts = [extract(part) for part in x.float().cpu().split(READ)]
        return partition.assign(compaction(np.concatenate(parts)))

    return place


def _read(
    source: Source,
    what: Callable[..., np.ndarray],
    count: int,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """``what`` of every batch of the chosen samples (default: all), joined."""
    rows = np.arange(count) if rows is None else rows
    with torch.no_grad():
        return np.concatenate(
            [what(source.get(rows[first : first + READ])) for first in range(0, count, READ)]
        )
