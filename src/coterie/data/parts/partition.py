"""Division of a data set into islands: disjoint shards, each for an expert trained alone.

Clusters of features give experts a subject; the shards carry hashes, so an ensemble can check that
its experts were trained on parts of one and the same partition (as in Decentralized Diffusion
Models, McAllister et al. 2025).

Legend: S samples, D feature dimensions, F fine centres, K shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.rng import numpy_generator

_CHUNK = 4096  # rows whose distances to all centres are held at once


@dataclass(frozen=True, eq=False)
class Shard:
    """Sorted sample indices of one island; ``sha256`` is over their little-endian i64 bytes."""

    index: int
    indices: np.ndarray  # i64
    sha256: str

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Partition:
    """K shards, and the fine centres that place a new sample: its nearest centre's group."""

    shards: tuple[Shard, ...]
    centers: np.ndarray  # f32 [F, D]
    groups: np.ndarray  # i64 [F], the shard of each centre

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Shard index i64 [S] of each row of ``features`` [S, D]."""
        return self.groups[_nearest(_checked(features), self.centers)[0]]


def shards_of(assignment: np.ndarray, k: int) -> tuple[Shard, ...]:
    """Shards from one shard number per sample: of clusters, classes, domains or at random."""
    assignment = np.asarray(assignment)
    if assignment.size and not 0 <= assignment.min() <= assignment.max() < k:
        raise DataError(describe("shard number", int(assignment.max()), f"0..{k - 1}"))
    shards = []
    for index in range(k):
        rows = np.flatnonzero(assignment == index).astype("<i8")
        shards.append(Shard(index, rows, hashlib.sha256(rows.tobytes()).hexdigest()))
    return tuple(shards)


def kmeans_partition(
    features: np.ndarray, k: int, seed: int, num_fine: int | None = None
) -> Partition:
    """k-means in two stages: ``num_fine`` centres (default 32 k), then k groups of centres.

    Grouping many small clusters follows the shape of the data better than k centres do and is no
    slower. Every shard is non-empty; DataError where there are fewer than k distinct samples.
    """
    features = _checked(features)
    if not 1 <= k <= len(features):
        raise ConfigError(describe("k", k, f"1..{len(features)}"))
    rng = numpy_generator(seed, "partition")
    fine = min(num_fine or 32 * k, max(k, len(features) // 4))
    if fine < k:
        raise ConfigError(describe("num_fine", num_fine, f"at least k = {k}"))
    centers = _lloyd(features, np.ones(len(features)), fine, rng)
    nearest = _nearest(features, centers)[0]
    counts = np.bincount(nearest, minlength=len(centers))
    if np.count_nonzero(counts) < k:
        raise DataError(f"features: fewer than {k} distinct samples; use fewer shards")
    centers, counts = centers[counts > 0], counts[counts > 0]
    groups = _nearest(centers, _lloyd(centers, counts.astype(float), k, rng))[0]
    partition = Partition((), centers, groups)
    return Partition(shards_of(partition.assign(features), k), centers, groups)


@dataclass(frozen=True, eq=False)
class Compaction:
    """Unit rows, then principal components of the features it was fitted on: what to cluster of a
    wide feature. ``mean`` f32 [D], ``axes`` f32 [D, dims]."""

    mean: np.ndarray
    axes: np.ndarray

    @staticmethod
    def fit(features: np.ndarray, dims: int = 64) -> Compaction:
        unit = _unit(features)
        mean = unit.mean(axis=0)
        centred = unit - mean
        _, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred)  # ascending
        return Compaction(mean, axes[:, ::-1][:, :dims].astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """f32 [S, D] -> f32 [S, dims]."""
        return (_unit(features) - self.mean) @ self.axes


def _unit(features: np.ndarray) -> np.ndarray:
    features = _checked(features)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(norms, 1e-12)
    return unit


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or 0 in features.shape:
        raise DataError(describe("features.shape", features.shape, "[samples, dimensions]"))
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise DataError(f"features: row {int(bad[0])} holds NaN or infinity")
    return features


def _nearest(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the nearest centre, squared distance to it), each [S]."""
    index = np.empty(len(points), dtype=np.int64)
    gap = np.empty(len(points), dtype=np.float32)
    norms = np.square(centers).sum(axis=1)
    for start in range(0, len(points), _CHUNK):
        rows = points[start : start + _CHUNK]
        table = norms - 2 * rows @ centers.T
        best = table.argmin(axis=1)
        index[start : start + _CHUNK] = best
        least = table[np.arange(len(rows)), best] + np.square(rows).sum(axis=1)
        gap[start : start + _CHUNK] = np.maximum(least, 0)
    return index, gap


def _lloyd(
    points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 25
) -> np.ndarray:
    """Weighted k-means: centres f32 [k, D]. An empty cluster restarts at the worst-served point."""
    centers = _seeds(points, weights, k, rng)
    for _ in range(rounds):
        index, gap = _nearest(points, centers)
        mass = np.bincount(index, weights, minlength=k)
        sums = np.zeros((k, points.shape[1]))
        np.add.at(sums, index, points * weights[:, None])
        updated = (sums / np.maximum(mass, 1e-12)[:, None]).astype(np.float32)
        empty = np.flatnonzero(mass == 0)
        updated[empty] = points[np.argsort(-gap, kind="stable")[: len(empty)]]
        if np.array_equal(updated, centers):
            break
        centers = updated
    return centers


def _seeds(points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is drawn with probability ~ weight * squared distance."""
    chosen = [int(rng.choice(len(points), p=weights / weights.sum()))]
    gap = np.square(points - points[chosen[0]]).sum(axis=1)
    while len(chosen) < k:
        mass = weights * gap
        if mass.sum() == 0:  # fewer distinct points than centres: repeat one
            chosen.append(chosen[-1])
            continue
        chosen.append(int(rng.choice(len(points), p=mass / mass.sum())))
        gap = np.minimum(gap, np.square(points - points[chosen[-1]]).sum(axis=1))
    return points[chosen].astype(np.float32)
