"""``coterie compose``: from trained runs to one that samples their composition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.main import run
from coterie.core.config import override
from coterie.recipes import get_recipe
from coterie.recipes.fkc import BOTH, LOW, composed, expert
from coterie.train.run import load_run, start
from coterie.train.sampling import generate

SMALL = {
    "train.steps": 2,
    "train.batch": 4,
    "train.warmup": 0,
    "train.threads": 1,
    "model.backbone.trunk.depth": 1,
    "model.backbone.trunk.width": 16,
    "model.backbone.trunk.heads": 2,
    "sample.steps": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, classes in (("low", LOW), ("high", (3, 4, 5, 6))):
        start(override(expert(classes), SMALL), folder / name, progress=False)
    return folder


def test_composed_runs_are_sampled_like_others(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high, both = (str(runs / name) for name in ("low", "high", "both"))
    words = ["compose", low, high, "--mode", "average", "--particles", "4", "--out", both]
    assert run(words) == 0 and run(words) == 0  # again: nothing to do
    assert run(["sample", both, "--num", "8", "-q"]) == 0
    (record,) = json.loads((runs / "both" / "samples" / "particles.json").read_text())
    assert (record["particles"], record["systems"], len(record["steps"])) == (4, 2, 3)
    assert len(record["log_ratio"]) == 2 and 0 < record["summary"]["ess_least"] <= 1
    loaded = load_run(both)
    assert loaded.model.members.names == ("low", "high") and loaded.model.betas == (0.5, 0.5)
    first = generate(loaded, 4).x
    assert first.equal(generate(loaded, 8).x[:4])
    capsys.readouterr()
    plain = [*words[:-1], str(runs / "sum"), "--corrector", "none", "--json"]
    assert run(plain) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["sample"]["solver"]["kind"] == "dpmpp_2m"
    assert run(["sample", str(runs / "sum"), "--num", "3", "-q"]) == 0
    assert not (runs / "sum" / "samples" / "particles.json").exists()


def test_a_model_directory_is_an_expert_too(runs: Path) -> None:
    out = str(runs / "mixed")
    words = ["compose", str(runs / "low" / "model"), str(runs / "high"), "--out", out]
    assert run([*words, "--betas", "1,0.5", "--particles", "2"]) == 0
    made = load_run(out)
    assert made.model.betas == (1.0, 0.5) and made.config.sample.batch % 2 == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["low", "nothing"], "RUN: .*nothing"),
        (["low/model", "high/model"], "allowed: a run directory"),
        (["low", "high", "--betas", "1,-1"], "sum is above 0"),
        (["low", "high", "--betas", "1"], "2, one per expert"),
        (["low", "high", "--mode", "anneal"], "mode: 'anneal'"),
        (["low", "high", "--betas", "1;2"], "no list of numbers"),
        (["low", "high", "--labels", "given,cat"], "neither given, nor null"),
        (["low", "high", "--process", "fast"], "kind: 'fast'"),
    ],
)
def test_what_cannot_be_composed_is_one_line(
    runs: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.chdir(runs)
    assert run(["compose", *words, "--out", "refused"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (runs / "refused").exists()


def test_runs_of_another_shape_or_process_are_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = override(expert(LOW), {**SMALL, "data.data": {"kind": "digits", "pad": 2}})
    wide = override(wide, {"model.backbone.image_size": 12})
    start(wide, runs / "wide", progress=False)
    flow = override(expert(LOW), {**SMALL, "model.process": "rectified_flow"})
    start(override(flow, {"model.view": "flow"}), runs / "flow", progress=False)
    low = str(runs / "low")
    assert run(["compose", low, str(runs / "wide"), "--out", str(runs / "no")]) == 2
    assert "members.wide.sample_shape: (1, 12, 12)" in capsys.readouterr().err
    assert run(["compose", low, str(runs / "flow"), "--out", str(runs / "no")]) == 2
    assert "name the one to sample in" in capsys.readouterr().err
    words = ["compose", low, str(runs / "flow"), "--process", "vp_linear"]
    assert run([*words, "--out", str(runs / "matched"), "--particles", "2"]) == 0
    assert run(["sample", str(runs / "matched"), "--num", "2", "--steps", "3", "-q"]) == 0


def test_the_arms_of_the_recipe_spend_equally_many_calls(runs: Path) -> None:
    arms = get_recipe("fkc").arms()
    calls = {
        arms[name].sample.solver.evaluations(arms[name].sample.steps) for name in list(arms)[2:]
    }
    assert len(calls) == 1
    made = composed((0.5, 0.5), "fkc", (str(runs / "low"), str(runs / "high")), 4)
    run_dir = start(override(made, {"sample.batch": 8, "sample.steps": 3}), runs / "arm")
    loaded = load_run(run_dir)
    assert loaded.source.classes == BOTH and generate(loaded, 8).particles[0].systems == 2
