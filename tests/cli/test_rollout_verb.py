"""``coterie rollout`` on a run of a few steps: a table, intervals, pictures, the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.main import run as coterie
from coterie.core.config import override
from coterie.recipes import get_recipe
from coterie.recipes.common import image_tiny
from coterie.runs.config import RunConfig
from coterie.runs.training import start

SHORT = {"train.steps": 1, "train.batch": 4, "train.threads": 1, "sample.steps": 2}
POLICY = {"data.episodes": 16, "model.backbone.trunk.depth": 1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = override(get_recipe("mode-policy").config(), {**SHORT, **POLICY})
    return start(config, tmp_path_factory.mktemp("rollout") / "run", progress=False)


def test_episodes_are_counted_drawn_and_written(policy: Path, capsys: Any) -> None:
    assert coterie(["rollout", str(policy), "--num", "8", "--cached", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["goal"] for row in found["goals"]] == [
        *("far right", "right", "left", "far left"),
        "all",
    ]
    whole = found["goals"][-1]
    assert whole["episodes"] == 8 and 0 <= whole["low"] <= whole["success"] <= whole["high"] <= 1
    assert found["cache"]["caches"] == ["routing", "modulation"]
    assert found["cache"]["flops_saved"] > 0 and found["cache"]["with_ms"] > 0
    folder = policy / "rollouts"
    names = {path.name for path in folder.iterdir()}
    assert {"grid.png", "rollouts.gif", "rollouts.json", "samples.json"} <= names


def test_a_table_for_people(policy: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["rollout", str(policy), "--num", "2", "--labels", "1", "-q", "--out", str(tmp_path)]
    assert coterie(words) == 0
    out = capsys.readouterr().out
    assert "far right" not in out and "right" in out and "high" in out
    assert str(tmp_path / "grid.png") in out


def test_runs_that_act_in_no_simulator_are_refused(tmp_path: Path, capsys: Any) -> None:
    config: RunConfig = override(image_tiny("dit"), {**SHORT, "model.backbone.trunk.depth": 1})
    path = start(config, tmp_path / "digits", progress=False)
    assert coterie(["rollout", str(path), "-q"]) == 2
    assert "brings no simulator" in capsys.readouterr().err
