"""Demonstrations, their windows, and the simulator they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError
from coterie.data import build_source
from coterie.data.actions.chunks import ActionSource, Demonstrations, demonstrate
from coterie.data.worlds.obstacle import RADIUS, ObstacleSimulator

SMALL = {"kind": "obstacle", "episodes": 40}


def episodes(**changes: Any) -> Demonstrations:
    """Two of them, 3 and 2 moments long; action and observation count the moments."""
    moments = np.arange(5, dtype=np.float32)
    fields = {
        "observations": np.stack([moments, -moments], 1)[:, None],
        "actions": moments[:, None] / 10,
        "lengths": np.array([3, 2]),
        "goals": np.array([1, 0]),
    }
    return Demonstrations(**{**fields, **changes})


def source(horizon: int = 3, **changes: Any) -> ActionSource:
    rest = np.array([9.0], np.float32)
    names = ("a", "b")
    return ActionSource(
        "mine", episodes(**changes), horizon, goal_names=names, rest=rest, licence=""
    )


def test_windows_end_where_their_episode_does() -> None:
    batch = source().get([0, 1, 2, 3, 4])
    rows = [[0, 0.1, 0.2], [0.1, 0.2, 9], [0.2, 9, 9], [0.3, 0.4, 9], [0.4, 9, 9]]
    assert torch.equal(batch.x[:, :, 0], torch.tensor(rows))
    assert batch.cond.label.tolist() == [1, 1, 1, 0, 0]
    assert batch.cond.tokens[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_dropping_the_goal_keeps_what_is_seen() -> None:
    cond = source().get([0, 4]).cond.as_null(2)
    assert cond.label.tolist() == [NULL_LABEL] * 2 and cond.tokens[:, 0, 0].tolist() == [0, 4]


def test_bad_demonstrations_are_named() -> None:
    bad = np.array([[0.0], [0.1], [0.2], [np.nan], [0.4]])
    with pytest.raises(DataError, match="mine: actions of episode 1, step 0 hold NaN"):
        source(actions=bad)
    with pytest.raises(DataError, match=r"goals: class id of sample 1: 2 .*0\.\.1"):
        source(goals=np.array([0, 2]))
    with pytest.raises(DataError, match="mine: moments: '5 actions, 5 observations'"):
        source(lengths=np.array([3, 3]))
    with pytest.raises(DataError, match=r"goals: 1 .*2, one per episode"):
        source(goals=np.array([0]))


def test_the_demonstrator_reaches_every_goal_both_ways() -> None:
    simulator = ObstacleSimulator()
    goals, seeds = np.arange(64) % 4, list(range(64))
    noise = 0.2 * np.random.default_rng(0).standard_normal((simulator.limit, 64, 2))
    made, success = demonstrate(simulator, goals, seeds, noise)
    assert success.all() and made.actions.dtype == np.float32
    assert np.abs(made.actions).max() <= 1.0 and int(made.lengths.sum()) == len(made.actions)
    for goal in range(4):
        ways = simulator.way[goals == goal]
        assert set(ways.tolist()) == {0, 1}
    assert np.allclose(simulator.places, simulator.targets, atol=0.1)


def test_the_mean_of_both_ways_runs_into_the_obstacle() -> None:
    simulator = ObstacleSimulator()
    simulator.reset(np.array([1, 2]), [0, 1])
    while not simulator.over.all():
        simulator.step(np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert not simulator.success.any()
    assert (np.linalg.norm(simulator.places, axis=1) < RADIUS).all()


def test_an_episode_depends_on_its_own_goal_seed_and_actions() -> None:
    def place(goals: list[int], seeds: list[int]) -> np.ndarray:
        simulator = ObstacleSimulator()
        simulator.reset(np.array(goals), seeds)
        for _ in range(9):
            simulator.step(simulator.expert())
        return simulator.places[0]

    assert np.array_equal(place([2], [7]), place([2, 0, 1], [7, 8, 9]))
    assert not np.array_equal(place([2], [7]), place([2], [8]))


def test_an_episode_that_is_over_stays_where_it_is() -> None:
    simulator = ObstacleSimulator(limit=3)
    simulator.reset(np.array([0]), [0])
    for _ in range(5):
        simulator.step(np.ones((1, 2)))
    place = simulator.places.copy()
    simulator.step(np.ones((1, 2)))
    assert simulator.over.all() and np.array_equal(simulator.places, place)


def test_the_simulator_refuses_what_it_cannot_do() -> None:
    simulator = ObstacleSimulator()
    with pytest.raises(DataError, match=r"goal: 4 .*0\.\.3"):
        simulator.reset(np.array([0, 4]), [0, 1])
    simulator.reset(np.array([0, 1]), [0, 1])
    with pytest.raises(DataError, match=r"actions\.shape: \(2, 3\) .*\(2, 2\)"):
        simulator.step(np.zeros((2, 3)))
    with pytest.raises(DataError, match="that of episode 1 holds NaN"):
        simulator.step(np.array([[0.0, 0.0], [0.0, np.nan]]))


def test_splits_are_other_episodes_and_always_the_same() -> None:
    train, again = build_source(SMALL), build_source(SMALL)
    held = build_source(SMALL, "held_out")
    assert train.num_episodes == 40 and held.num_episodes == 10
    first = train.get([0, 5])
    assert torch.equal(first.x, again.get([0, 5]).x) and first.x.shape == (2, 8, 2)
    starts = {tuple(s.get([0]).cond.tokens.flatten().tolist()) for s in (train, held)}
    assert len(starts) == 2


def saved(path: Path, **changes: Any) -> dict[str, Any]:
    made = episodes()
    arrays = {name: getattr(made, name) for name in ("observations", "actions", "lengths", "goals")}
    arrays = {name: a for name, a in {**arrays, **changes}.items() if a is not None}
    np.savez(path, **arrays)
    return {"kind": "demonstrations", "path": str(path), "horizon": 2}


def test_episodes_of_ones_own_are_read_from_a_file(tmp_path: Path) -> None:
    config = saved(tmp_path / "mine.npz")
    train, held = build_source(config), build_source(config, "held_out")
    assert len(train) + len(held) == 5 and {train.num_episodes, held.num_episodes} == {1}
    assert train.class_names == ("goal 0", "goal 1") and train.make_simulator is None
    flat = saved(tmp_path / "flat.npz", observations=np.zeros((5, 3)), goals=None)
    assert build_source(flat).observation == (1, 3) and build_source(flat).num_classes == 0


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(DataError, match=r"path: .*an \.npz file of episodes"):
        build_source({"kind": "demonstrations", "path": str(path)})
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"bad\.npz: not a readable"):
        build_source({"kind": "demonstrations", "path": str(path)})
    with pytest.raises(DataError, match=r"arrays: .*observations, actions, lengths"):
        build_source(saved(path, actions=None))
    with pytest.raises(DataError, match="episode 1, step 1 hold NaN"):
        build_source(saved(path, actions=np.array([[0.0], [0], [0], [0], [np.inf]])))
    with pytest.raises(DataError, match=r"goals: 'float64 of shape"):
        build_source(saved(path, goals=np.array([0.5, 1.0])))
    with pytest.raises(DataError, match=r"class id of sample 0: 1 .*0\.\.0"):
        build_source({**saved(path), "num_goals": 1})
    with pytest.raises(DataError, match=r"rest: .*1 numbers"):
        build_source({**saved(path), "rest": [0.0, 1.0]})
