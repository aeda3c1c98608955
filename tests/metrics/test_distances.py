"""Distances against closed forms and against what must be larger or smaller."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from coterie.core.errors import ConfigError, DataError
from coterie.metrics import (
    frechet_distance,
    gaussian_frechet,
    kid_unbiased,
    precision_recall,
)


def _covariance(rng, dim):
    root = rng.normal(size=(dim, dim))
    return root @ root.T + 0.1 * np.eye(dim)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 8))
def test_frechet_equals_the_matrix_square_root(seed, dim):
    rng = np.random.default_rng(seed)
    mean1, mean2 = rng.normal(size=(2, dim))
    cov1, cov2 = _covariance(rng, dim), _covariance(rng, dim)
    root = linalg.sqrtm(cov1 @ cov2).real
    wanted = np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert gaussian_frechet(mean1, cov1, mean2, cov2) == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_frechet_of_diagonal_gaussians():
    one, two = np.diag([1.0, 4.0]), np.diag([9.0, 4.0])
    assert gaussian_frechet(np.zeros(2), one, np.array([3.0, 0.0]), two) == pytest.approx(9 + 4)


def test_frechet_of_samples_approaches_the_closed_form():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20_000, 3))
    second = rng.normal(size=(20_000, 3)) * (1, 2, 1) + (0, 0, 1)
    assert frechet_distance(first, second) == pytest.approx(2.0, abs=0.1)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_frechet_with_fewer_rows_than_dimensions_stays_finite():
    rng = np.random.default_rng(0)
    assert 0 < frechet_distance(rng.normal(size=(10, 50)), rng.normal(size=(12, 50))) < 200


def _naive_kid(first, second):
    scale = second.std(axis=0)
    first, second = first / scale, second / scale

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    one = [kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j]
    two = [kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j]
    both = [kernel(x, y) for x in first for y in second]
    return np.mean(one) + np.mean(two) - 2 * np.mean(both)


def test_kid_equals_the_double_loop():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, 4)) + 0.3, rng.normal(size=(7, 4)) * 2
    assert kid_unbiased(first, second).value == pytest.approx(_naive_kid(first, second))


def test_kid_is_unbiased_and_its_error_is_honest():
    rng = np.random.default_rng(0)
    found = [kid_unbiased(rng.normal(size=(60, 5)), rng.normal(size=(60, 5))) for _ in range(200)]
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    assert (values < 0).any() and (values > 0).any()
    stated = np.mean([estimate.stderr for estimate in found])
    assert 0.7 * values.std() < stated < 4 * values.std()


def test_kid_does_not_depend_on_units_or_on_a_dead_channel():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(50, 3)) + 0.5, rng.normal(size=(50, 3))
    scale = np.array([1.0, 100.0, 0.01])
    value = kid_unbiased(first, second).value
    assert kid_unbiased(first * scale, second * scale).value == pytest.approx(value)
    dead = np.zeros((50, 1))
    assert np.isfinite(kid_unbiased(np.hstack([first, dead]), np.hstack([second, dead])).value)


def test_all_distances_order_damage():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(800, 6))
    shifted = [rng.normal(size=(800, 6)) + shift for shift in (0.0, 0.3, 1.0)]
    frechet = [frechet_distance(rows, real) for rows in shifted]
    kid = [kid_unbiased(rows, real).value for rows in shifted]
    precision = [precision_recall(rows, real).precision for rows in shifted]
    assert frechet == sorted(frechet) and kid == sorted(kid)
    assert precision[2] < 0.8 * precision[0]  # a small shift within the ball of k neighbours hides
    assert kid[1] > 5 * abs(kid[0])


def test_precision_and_recall_tell_what_is_wrong():
    rng = np.random.default_rng(0)
    modes = np.array([[0.0, 0.0], [10.0, 0.0]])
    real = modes[rng.integers(0, 2, 600)] + rng.normal(size=(600, 2)) * 0.3
    collapsed = rng.normal(size=(600, 2)) * 0.3
    invented = np.concatenate([real[:300] + 0.01, rng.normal((0, 50), size=(300, 2))])
    assert precision_recall(real, real) == (1.0, 1.0)
    found = precision_recall(collapsed, real)
    assert found.precision > 0.9 and 0.4 < found.recall < 0.6
    found = precision_recall(invented, real)
    assert found.precision == pytest.approx(0.5, abs=0.02) and found.recall > 0.9


def test_manifold_radius_is_the_kth_other_sample():
    real = np.array([[0.0], [1.0], [3.0], [6.0]])
    # k = 1: balls of radius 1, 1, 2, 3 around the four samples
    probes = np.array([[-1.0], [-1.1], [9.0], [9.1]])
    assert precision_recall(probes, real, k=1).precision == 0.5


def test_large_sets_are_handled_in_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(70, 4)), rng.normal(size=(50, 4)) + 0.2
    whole = (kid_unbiased(first, second).value, precision_recall(first, second))
    for module in ("kernel", "manifold"):
        monkeypatch.setattr(f"coterie.metrics.{module}.CHUNK", 16)
    assert kid_unbiased(first, second).value == pytest.approx(whole[0])
    assert precision_recall(first, second) == whole[1]


@pytest.mark.parametrize("metric", [frechet_distance, kid_unbiased, precision_recall])
def test_bad_input_is_refused(metric):
    rows = np.random.default_rng(0).normal(size=(10, 3))
    broken = rows.copy()
    broken[4, 1] = np.inf
    with pytest.raises(DataError, match="samples, dimensions"):
        metric(rows[0], rows)
    with pytest.raises(DataError, match=r"second\.shape\[1\]: 2"):
        metric(rows, rows[:, :2])
    with pytest.raises(DataError, match="second: row 4 holds NaN or infinity"):
        metric(rows, broken)
    with pytest.raises(DataError, match="number of rows: 1"):
        metric(rows[:1], rows)


def test_bad_options_are_refused():
    rows = np.random.default_rng(0).normal(size=(10, 3))
    with pytest.raises(ConfigError, match="k: 0"):
        precision_recall(rows, rows, k=0)
    with pytest.raises(ConfigError, match="blocks: 1"):
        kid_unbiased(rows, rows, blocks=1)
