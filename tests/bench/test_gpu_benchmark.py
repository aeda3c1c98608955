"""The one command for a GPU, rehearsed on the CPU; and what its table and verdict say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from coterie.bench import gpu_peers, gpu_speed, gpu_summary
from coterie.bench.expert_cases import Call, Setup
from coterie.bench.gpu_clock import Clock
from coterie.bench.timing import Place


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_parts_are_rehearsed_resumed_and_summed_up(tmp_path: Path, monkeypatch, capsys) -> None:
    gpu = script()
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    )
    for _ in range(2):
        gpu.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "tune"])
    gpu.main()
    tuned = json.loads((tmp_path / "tune-quick.json").read_text())["result"]
    assert "triton" in tuned["missing"] and not tuned["rows"]
    names = ("correctness", "speed-quick", "training", "sampling")
    said = capsys.readouterr().out
    assert all(f"{name}: done at this commit" in said for name in names)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["result"] for name in names}
    for row in found["correctness"]:
        assert row["worst"] < (1e-5 if row["dtype"] == "torch.float32" else 3e-2), row
    assert {row["backend"] for row in found["correctness"]} >= {"loop", "sorted", "grouped"}
    rows = {row["candidate"]: row for row in found["speed-quick"]["rows"]}
    assert set(rows) >= {"auto", "sorted", "grouped", "dense_layer", "cublas"}
    assert all(row["forward_ms"] > 0 and row["train_ms"] > 0 for row in rows.values())
    assert {"triton", "sonicmoe"} <= set(found["speed-quick"]["missing"])
    assert found["training"]["seconds_per_step"] > 0 and found["sampling"]["seconds"] > 0
    page = (tmp_path / "summary.md").read_text()
    assert "left out: sonicmoe: not installed" in page and "## Goals" in page
    goals = json.loads((tmp_path / "summary.json").read_text())["goals"]
    assert len(goals) == 3 and all(goal["met"] is None for goal in goals)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    gpu = script()

    def broken() -> None:
        raise RuntimeError("out of memory")

    parts = {"correctness": broken, "training": lambda: {"seconds_per_step": 1.0}}
    monkeypatch.setattr(gpu, "parts", lambda device, quick: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: correctness"):
        gpu.main()
    assert "out of memory" in capsys.readouterr().out
    assert (tmp_path / "training.json").is_file() and not (tmp_path / "correctness.json").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "sped"])
    with pytest.raises(SystemExit, match="begins none of"):
        gpu.main()


def test_a_wrong_peer_is_named_and_not_timed() -> None:
    setup = Setup(gpu_speed.QUICK, Place())
    calls, missing = gpu_peers.candidates(setup)
    own = calls["sorted"]
    calls["wrong"] = Call(lambda: 1.1 * own.run(), own.leaves)
    calls["empty"] = Call(lambda: own.run() * float("nan"), own.leaves)
    right, errors = gpu_speed.checked(calls, setup, missing)
    assert "sorted" in right and errors["sorted"] < 1e-5
    assert not {"wrong", "empty"} & set(right)
    assert "answers otherwise" in missing["wrong"] and "nan" in missing["empty"]


def test_the_clock_times_everybody_in_every_round() -> None:
    count = {"a": 0, "b": 0}

    def call(name: str) -> None:
        count[name] += 1
        torch.ones(10).sum()

    times = Clock("cpu", repeats=5, warmups=2).times(
        {name: lambda name=name: call(name) for name in count}
    )
    assert count == {"a": 7, "b": 7} and {len(one) for one in times.values()} == {5}
    short = Clock("cpu", repeats=50, warmups=0, seconds=0.0).times({"a": lambda: call("a")})
    assert len(short["a"]) == 3


def figures(candidate: str, forward: float, peer: float, saved: float) -> dict:
    row = {"candidate": candidate, "saved_mib": saved}
    for mode in ("forward", "train"):
        row |= {f"{mode}_ms": forward, f"{mode}_vs_peer": peer, f"{mode}_vs_grouped": peer}
    return row


def test_the_verdict_holds_ours_against_the_best_peer_and_the_dense_layer() -> None:
    rows = [
        figures("triton", 1.0, 0.9, 3.0),
        figures("liger", 2.0, 1.0, 4.0),
        figures("grouped", 1.5, 1.0, 4.0),
        figures("dense_layer", 0.5, 1.0, 4.0),
    ]
    made = gpu_summary.verdict({"speed-fine64-8192": {"rows": rows}, "training": {}})
    found = {goal["what"]: (goal["value"], goal["met"]) for goal in made}
    assert found["forward / best peer (grouped)"] == (0.9, True)
    assert found["train / grouped_mm"] == (0.9, False)  # at least 1.3 times faster is asked
    assert found["saved / dense layer"] == (0.75, True)
