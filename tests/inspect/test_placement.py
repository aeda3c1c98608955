"""Experts on devices: nothing is lost, bounds hold, copies take what is hot."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from coterie.core.errors import ConfigError
from coterie.inspect.statistics.device_placement import (
    STRATEGIES,
    Placement,
    RowCost,
    fit_cost,
    in_order,
    place,
    strategies,
)


def loads(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).pareto(1.5, count) * 100.0


def best(rows: np.ndarray, devices: int) -> float:
    """The least makespan there is, by trying everything."""
    found = math.inf
    for where in itertools.product(range(devices), repeat=len(rows)):
        found = min(found, np.bincount(where, weights=rows, minlength=devices).max())
    return found


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_longest_first_is_within_its_bound_of_the_best(devices: int, seed: int) -> None:
    rows = loads(7, seed)
    made, oracle = place(rows, devices), best(rows, devices)
    assert oracle <= made.makespan + 1e-9
    assert made.makespan <= (4 / 3 - 1 / (3 * devices)) * oracle + 1e-9


@pytest.mark.parametrize("devices", [1, 3, 8, 64])
@pytest.mark.parametrize("places", [None, 8, 20])
def test_every_row_is_served_once_and_no_device_holds_too_much(
    devices: int, places: int | None
) -> None:
    rows = loads(8, 3)
    made = place(rows, devices, places)
    assert made.rows.sum() == pytest.approx(rows.sum())
    assert made.makespan >= made.ideal - 1e-9 and made.ideal == pytest.approx(rows.sum() / devices)
    assert all(len(set(where)) == len(where) >= 1 for where in made.devices)
    assert made.held.sum() == made.copies
    assert places is None or made.held.max() <= places
    assert places is not None or made.copies == len(rows)


def test_copies_go_to_hot_experts_and_never_make_it_slower() -> None:
    rows = np.array([900.0, 50.0, 30.0, 20.0])
    alone, copied = place(rows, 4, 1), place(rows, 4, 2)
    assert alone.makespan == 900.0
    assert len(copied.devices[0]) == 4 and copied.makespan < 300.0
    for seed in range(5):
        found = strategies(loads(16, seed), 8, 1)
        spans = [made.makespan for made in found.values()]
        assert spans[2] <= spans[1] * 1.001 and spans[1] <= spans[0] * 1.2


def test_more_devices_than_experts_are_used_by_copies_only() -> None:
    rows = np.full(4, 100.0)
    assert in_order(rows, 16).makespan == 100.0 and place(rows, 16, 1).makespan == 25.0


def test_the_cost_of_a_device_is_a_line_through_what_was_measured() -> None:
    cost = fit_cost([64, 256, 1024], [1e-4 + 2e-6 * n for n in (64, 256, 1024)])
    assert cost.per_row == pytest.approx(2e-6) and cost.per_expert == pytest.approx(1e-4)
    assert fit_cost([10, 20], [1e-3, 3e-3]).per_expert == 0.0
    made = Placement(((0,), (1,)), np.array([100.0, 0.0]), np.array([1.0, 1.0]))
    assert RowCost(1e-6, 1e-5).seconds(made) == pytest.approx([1.1e-4, 0.0])


def test_what_cannot_be_placed() -> None:
    with pytest.raises(ConfigError, match=r"places: 1 .*allowed: 2 or more"):
        place([1.0, 2.0, 3.0], 2, 1)
    with pytest.raises(ConfigError, match="devices: 0"):
        in_order([1.0], 0)
    for bad in ([], [-1.0], [math.nan]):
        with pytest.raises(ConfigError, match="loads"):
            place(bad, 2)


def test_D13_copies_are_never_slower_than_what_they_extend() -> None:
    rng = np.random.default_rng(3)
    cost = RowCost(1.0, 5.0)
    worse_before = 0
    for _ in range(300):
        experts, devices = int(rng.integers(2, 12)), int(rng.integers(1, 9))
        loads = rng.pareto(1.0, experts) * 10
        spare = int(rng.integers(0, 3))
        each = -(-experts // devices)
        for by in (None, cost):
            made = strategies(loads, devices, spare, by)
            slowest = [float((by or RowCost(1.0)).seconds(made[name]).max()) for name in STRATEGIES]
            assert slowest == sorted(slowest, reverse=True)
        plain, copied = place(loads, devices, each), place(loads, devices, each + spare)
        worse_before += float(cost.seconds(copied).max()) > float(cost.seconds(plain).max())
    assert worse_before  # it did happen
