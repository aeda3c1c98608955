"""Routers as classifiers: cases whose calibration is known."""

from __future__ import annotations

import numpy as np
import pytest

from coterie.core.errors import DataError
from coterie.metrics.calibration import (
    calibration_error,
    class_probabilities,
    match_experts,
    router_calibration,
)


def test_experts_belong_to_the_class_that_uses_them_most() -> None:
    use = np.array([[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.5, 0.4]])
    assert match_experts(use, np.array([0, 0, 1, 1]), 3).tolist() == [0, 1, 1]


def test_what_is_spent_on_experts_of_a_class_is_its_probability() -> None:
    use = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    probs = class_probabilities(use, np.array([0, 1, 0]), 2)
    np.testing.assert_allclose(probs, [[0.75, 0.25], [1, 0], [0.5, 0.5]])


def test_calibration_error_of_closed_cases() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    sure = np.tile([1.0, 0.0], (10, 1))
    assert calibration_error(sure, labels) == pytest.approx(0.2)
    honest = np.tile([0.8, 0.2], (10, 1))
    assert calibration_error(honest, labels) == pytest.approx(0.0, abs=1e-12)
    # Two bins: five rows say 0.6 and are all right, five say 0.9 and three are.
    mixed = np.array([[0.6, 0.4]] * 5 + [[0.9, 0.1]] * 5)
    assert calibration_error(mixed, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.3)


def test_a_router_that_knows_and_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    knows = np.eye(8)[2 * labels + rng.integers(0, 2, 400)]
    assert router_calibration(knows, labels, 4) == (1.0, pytest.approx(0.0))
    blind = rng.dirichlet(np.ones(8), 400)
    accuracy, error = router_calibration(blind, labels, 4)
    assert accuracy < 0.4 and error > 0.1


def test_tables_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match=r"probs_SC: '\(3, 2\) for \(2,\)'"):
        calibration_error(np.ones((3, 2)), np.array([0, 1]))
    with pytest.raises(DataError, match="NaN"):
        calibration_error(np.full((2, 2), np.nan), np.array([0, 1]))
