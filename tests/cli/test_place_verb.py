"""``coterie place``: from a run's routing loads to a simulated step on many devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.main import run
from coterie.core.config import override
from coterie.recipes.dit_moe import arms
from coterie.runs.training import start

SMALL = {
    "data": {"kind": "digits"},
    "train.steps": 2,
    "train.batch": 4,
    "train.warmup": 0,
    "train.threads": 1,
    "model.backbone.image_size": 8,
    "model.backbone.patch": 2,
    "model.backbone.trunk.depth": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("moe", "dense"):
        start(override(arms()[name], SMALL), folder / name, progress=False)
    return folder


def test_a_run_is_placed_on_few_and_on_many_devices(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["place", str(runs / "moe"), "--devices", "2,64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (runs / "moe" / "placement" / "placement.png").exists()
    rows = {(row["devices"], row["strategy"]): row for row in found["rows"]}
    assert len(rows) == 6 and found["cost"]["per_row"] > 0
    assert all(0 < row["efficiency"] <= 1.0 for row in rows.values())
    assert rows[64, "in order"]["efficiency"] <= 8 / 64  # eight experts keep eight devices busy
    assert rows[64, "greedy with copies"]["efficiency"] > 2 * rows[64, "in order"]["efficiency"]
    assert rows[2, "greedy"]["step_ms"] <= rows[2, "in order"]["step_ms"] * 1.001
    (layer,) = found["layers"]
    assert len(layer["load"]) == 8 and sum(layer["load"]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["dense"], "routers choose for tokens"), (["moe", "--devices", "0"], "no list of numbers")],
)
def test_what_cannot_be_placed(
    runs: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["place", str(runs / words[0]), *words[1:]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
