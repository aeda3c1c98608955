"""Meta-World's tasks as a source: its experts succeed, episodes repeat, what is missing is said."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.data import build_source

REACH = {"kind": "metaworld", "tasks": ["reach-v3"], "episodes": 4}


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"metaworld.*coterie\[robots\].*No module named"):
        build_source(REACH)


def test_tasks_differ() -> None:
    with pytest.raises(ConfigError, match=r"tasks: .*different tasks"):
        build_source({"kind": "metaworld", "tasks": ["reach-v3", "reach-v3"]})


def test_experts_reach_and_episodes_repeat() -> None:
    pytest.importorskip("metaworld")
    source = build_source(REACH)
    assert source.shape == (8, 4) and source.observation == (1, 39)
    assert source.class_names == ("reach-v3",) and source.num_episodes == 4
    simulator: Any = source.make_simulator()
    first = simulator.reset(np.zeros(2, np.int64), [1, 2])
    while not simulator.over.all():
        simulator.step(simulator.expert())
    assert simulator.success.all() and (simulator.way == -1).all()
    assert np.array_equal(simulator.reset(np.zeros(1, np.int64), [1])[0], first[0])
    with pytest.raises(DataError, match="that of episode 0 holds NaN"):
        simulator.step(np.full((1, 4), np.nan))
    with pytest.raises(DataError, match=r"goal: 1 .*0\.\.0"):
        simulator.reset(np.array([1]), [0])


def test_a_task_it_does_not_have_is_named() -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(ConfigError, match=r"tasks: 'fly-v3' .*reach-v3"):
        build_source({"kind": "metaworld", "tasks": ["fly-v3"]})
