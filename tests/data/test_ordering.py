"""The order of training samples is a function of seed and position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.errors import ConfigError
from coterie.data import order


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 50),
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
)
def test_any_cutting_gives_the_same_stream(seed, size, cuts):
    position, pieces = 0, []
    for count in cuts:
        pieces.append(order(seed, position, count, size))
        position += count
    assert np.array_equal(np.concatenate(pieces), order(seed, 0, position, size))


def test_every_epoch_is_another_permutation():
    epochs = order(3, 0, 300, 100).reshape(3, 100)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(order(4, 0, 100, 100), epochs[0])


def test_stream_never_changes_between_versions():
    # Frozen: a run resumed with another version of this library or of NumPy sees the same data.
    assert order(0, 5, 8, 10).tolist() == [0, 1, 4, 2, 8, 9, 7, 3]


def test_positions_are_uniform():
    first = np.array([order(seed, 0, 1, 5)[0] for seed in range(2000)])
    counts = np.bincount(first, minlength=5)
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(400 * 0.8))


@pytest.mark.parametrize("arguments", [(0, -1, 1, 5), (0, 0, -1, 5), (0, 0, 1, 0)])
def test_impossible_arguments_are_named(arguments):
    with pytest.raises(ConfigError, match=r"order\.(position|count|size)"):
        order(*arguments)


def test_the_answer_may_be_written_to_without_harm():
    once = order(9, 0, 10, 10)
    once[:] = 0
    assert np.array_equal(np.sort(order(9, 0, 10, 10)), np.arange(10))
