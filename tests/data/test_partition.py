"""Islands: disjoint, complete, reproducible, and following the clusters that are there."""

import hashlib

import numpy as np
import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.data import Compaction, Subset, build_source, kmeans_partition, shards_of


def _blobs(k=4, each=60, dim=5):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(k, dim)) * 10
    labels = np.repeat(np.arange(k), each)
    return (centres[labels] + rng.normal(size=(k * each, dim))).astype(np.float32), labels


def test_clear_clusters_are_found():
    features, labels = _blobs()
    partition = kmeans_partition(features, 4, seed=0)
    covered = np.concatenate([shard.indices for shard in partition.shards])
    assert np.array_equal(np.sort(covered), np.arange(len(features)))
    for shard in partition.shards:
        assert len(shard) == 60 and len(set(labels[shard.indices])) == 1
        assert shard.sha256 == hashlib.sha256(shard.indices.astype("<i8").tobytes()).hexdigest()
    assert np.array_equal(partition.assign(features[shard.indices]), np.full(60, shard.index))


def test_two_stages_follow_shapes_of_unequal_size():
    rng = np.random.default_rng(1)
    big, small = rng.normal(size=(900, 2)), rng.normal(size=(50, 2)) * 0.2 + (9, 0)
    partition = kmeans_partition(np.concatenate([big, small]), 2, seed=0)
    assert sorted(map(len, partition.shards)) == [50, 900]


def test_seed_decides_and_nothing_else():
    features, _ = _blobs()
    first, second = (kmeans_partition(features, 6, seed=3) for _ in range(2))
    assert [s.sha256 for s in first.shards] == [s.sha256 for s in second.shards]


def test_every_shard_has_samples():
    features = np.random.default_rng(0).normal(size=(40, 3))
    for k in (1, 7, 40):
        assert min(map(len, kmeans_partition(features, k, seed=0).shards)) > 0


def test_too_few_distinct_samples():
    with pytest.raises(DataError, match="fewer than 3 distinct samples"):
        kmeans_partition(np.repeat([[0.0, 0.0], [1.0, 1.0]], 10, axis=0), 3, seed=0)


@pytest.mark.parametrize("k", [0, 241])
def test_k_out_of_range(k):
    with pytest.raises(ConfigError, match=r"k: \d+ is not allowed; allowed: 1\.\.240"):
        kmeans_partition(_blobs()[0], k, seed=0)


@pytest.mark.parametrize("features", [np.zeros(3), np.zeros((0, 2)), np.zeros((2, 2, 2))])
def test_bad_shapes(features):
    with pytest.raises(DataError, match="samples, dimensions"):
        kmeans_partition(features, 1, seed=0)


def test_not_finite_features_name_the_row():
    features = _blobs()[0]
    features[17, 2] = np.nan
    with pytest.raises(DataError, match="row 17"):
        kmeans_partition(features, 2, seed=0)


def test_shards_of_labels_make_islands_of_a_source():
    source = build_source("digits")
    labels = source.get(np.arange(len(source))).cond.label.numpy()
    shards = shards_of(labels, 10)
    island = Subset(source, shards[4].indices)
    assert (island.get(np.arange(len(island))).cond.label == 4).all()
    with pytest.raises(DataError, match=r"allowed: 0\.\.8"):
        shards_of(labels, 9)


def test_compact_keeps_the_leading_directions():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(300, 2))
    features = np.concatenate([plane, 1e-3 * rng.normal(size=(300, 6))], axis=1)
    small = Compaction.fit(features, 2)(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gaps = [np.linalg.norm(rows[:100, None] - rows[None, :100], axis=2) for rows in (small, unit)]
    assert small.shape == (300, 2) and np.allclose(*gaps, atol=0.05)
