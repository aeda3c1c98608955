"""Distances of clouds and of sets of clouds: closed cases, naive loops, inputs that do not fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.metrics import points
from coterie.metrics.points import (
    DISTANCES,
    chamfer_table,
    cloud_distance,
    compare_sets,
    matching_table,
    score_points,
)


def clouds(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size, 3))


def naive_chamfer(x: np.ndarray, y: np.ndarray) -> float:
    table = [[sum((a - b) ** 2) for b in y] for a in x]
    there = sum(min(row) for row in table) / len(x)
    return there + sum(min(row[j] for row in table) for j in range(len(y))) / len(y)


def test_tables_are_naive_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "CHUNK", 25)  # two clouds at a time
    x, y = clouds(5), clouds(3, 9, seed=1)
    table = chamfer_table(x, y)
    for i, j in np.ndindex(5, 3):
        assert table[i, j] == pytest.approx(naive_chamfer(x[i], y[j]))
    within = chamfer_table(x, x)
    assert np.allclose(within, [[naive_chamfer(a, b) for b in x] for a in x])
    assert np.array_equal(within, within.T) and not within.diagonal().any()


@pytest.mark.parametrize("squared", [True, False])
def test_the_matching_is_the_best_of_all(squared: bool) -> None:
    x, y = clouds(2, 5), clouds(2, 5, seed=1)
    table = matching_table(x, y, squared)
    for i, j in np.ndindex(2, 2):
        costs = [
            np.mean(
                [math.dist(x[i][k], y[j][to]) ** (2 if squared else 1) for k, to in enumerate(p)]
            )
            for p in itertools.permutations(range(5))
        ]
        assert table[i, j] == pytest.approx(min(costs))
    within = matching_table(x, x, squared)
    assert np.array_equal(within, within.T) and not within.diagonal().any()


@pytest.mark.parametrize(
    ("name", "wanted"), [("cd", 0.18), ("emd_squared", 0.09), ("emd_euclidean", 0.3)]
)
def test_a_small_translation_has_a_closed_form(name: str, wanted: float) -> None:
    """Points that are far apart, moved by 0.3: each is nearest to itself."""
    x = 10 * np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)
    assert cloud_distance(x, x + np.array([0.3, 0, 0]), name) == pytest.approx(wanted)
    assert cloud_distance(x, x[::-1], name) == 0
    y = torch.from_numpy(clouds(1, 27)[0])
    assert cloud_distance(torch.from_numpy(x), y, name) == pytest.approx(cloud_distance(y, x, name))


def test_a_set_against_itself_and_against_a_far_one() -> None:
    x = clouds(10)
    own, far = chamfer_table(x, x), chamfer_table(x, x + 100)
    same = compare_sets(own, own, own)
    assert (same.one_nn, same.coverage, same.mmd) == (0.0, 1.0, 0.0)
    other = compare_sets(own, far, own)
    assert other.one_nn == 1.0 and other.mmd > 1e4
    spread = compare_sets(own, np.repeat(far[:, :1], 10, axis=1), own)
    assert spread.coverage == 0.1


@pytest.mark.parametrize("name", DISTANCES)
def test_two_halves_of_one_set_are_hard_to_tell_apart(name: str) -> None:
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 2, (160, 1, 3))
    x = size * rng.standard_normal((160, 10, 3))
    found = score_points(x[:80], x[80:], distances=(name,))
    assert found["n"] == 80 and 0.4 <= found[f"one_nn_{name}"]["value"] <= 0.6


def test_ties_count_half() -> None:
    even = np.ones((4, 4))
    assert compare_sets(even, even, even).one_nn == 0.5


def test_scores_come_with_their_floor_and_are_thinned_to_equal_numbers() -> None:
    made, real = clouds(9) + 3, clouds(20, seed=1)
    found = score_points(
        torch.from_numpy(made), real[:8], real[8:], distances=("cd", "emd_squared")
    )
    assert found["n"] == 8
    assert set(found) == {"n"} | {
        f"{score}_{name}"
        for score in ("one_nn", "coverage", "mmd")
        for name in ("cd", "emd_squared")
    }
    assert found["one_nn_cd"]["value"] == 1.0 > found["one_nn_cd"]["floor"]
    assert found["mmd_cd"]["value"] > found["mmd_cd"]["floor"] > 0
    again = score_points(torch.from_numpy(made), real[:8], real[8:], distances=("cd",))
    assert again["mmd_cd"] == found["mmd_cd"]
    assert "floor" not in score_points(made, real)["one_nn_cd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :, :2], r"generated\.shape: \(4, 12, 2\)"),
        (lambda x: x[:, :0], r"generated\.shape: \(4, 0, 3\)"),
        (lambda x: x[:1], "generated: number of clouds: 1"),
        (lambda x: np.where(x == x[2, 3, 1], np.nan, x), "generated: cloud 2 holds NaN"),
    ],
)
def test_clouds_that_cannot_be_compared_are_named(change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_points(change(clouds(4)), clouds(4))


def test_settings_that_cannot_be() -> None:
    x = clouds(3)
    with pytest.raises(ConfigError, match=r"distance: 'cdd' .*did you mean 'cd'"):
        score_points(x, x, distances=("cdd",))
    with pytest.raises(DataError, match=r"second\.shape\[1\]: 9 .*12"):
        matching_table(x, clouds(2, 9), squared=True)
    with pytest.raises(DataError, match="shapes of the tables"):
        compare_sets(np.zeros((3, 3)), np.zeros((3, 2)), np.zeros((2, 2)))
    with pytest.raises(DataError, match="number of clouds: 1"):
        compare_sets(*[np.zeros((1, 1))] * 3)
