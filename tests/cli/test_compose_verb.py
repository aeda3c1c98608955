"""``coterie compose``: from trained runs to one that samples their composition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.main import run
from coterie.core.config import override
from coterie.recipes import get_recipe
from coterie.recipes.fkc import BOTH, LOW, composed, expert
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

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


def test_a_report_says_what_is_composed_and_who_had_weight(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(runs / "product")
    words = ["compose", str(runs / "low"), str(runs / "high"), "--particles", "3", "--out", out]
    assert run(words) == 0
    capsys.readouterr()
    assert run(["report", out, "-q"]) == 0
    said = capsys.readouterr().out
    assert "2 experts composed, mode product" in said and "no router made a choice" not in said
    found = json.loads((runs / "product" / "report" / "report.json").read_text())
    made = found["composition"]
    assert (made["particles"], made["systems"], len(made["steps"])) == (3, 22, 3)  # 64 shown
    assert len(made["log_normaliser"]) == 22 and found["num_samples"] == 64
    page = (runs / "product" / "report" / "index.html").read_text()
    assert 'id="composition"' in page and 'id="particles"' in page


def test_a_tilt_towards_a_registered_reward(runs: Path) -> None:
    low, out = str(runs / "low"), str(runs / "bright")
    words = ["compose", low, "--mode", "tilt", "--tilt", "2000", "--reward", "brightness"]
    assert run([*words, "--particles", "4", "--out", out]) == 0
    bright = load_run(out)
    assert bright.model.config.reward.kind == "brightness" and bright.model.zeta == 1.0
    assert run(["sample", out, "--num", "6", "-q"]) == 0  # the rest of a system is left away
    assert len(json.loads((runs / "bright" / "samples" / "samples.json").read_text())) == 6
    tilted, plain = generate(bright, 8).x, generate(load_run(low), 8).x
    assert tilted.mean() > plain.mean() + 0.1


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
        (["low", "--mode", "tilt", "--tilt", "2"], "--reward: None"),
        (["low", "--mode", "tilt", "--reward", "symmetry"], "--tilt: None"),
        (["low", "--mode", "tilt", "--tilt", "2", "--reward", "loud"], "kind: 'loud'"),
        (["low", "--mode", "tilt", "--tilt", "2", "--reward", "{"], "not valid JSON"),
        (["low", "--reward", "symmetry"], 'mode "product"'),
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


def test_D1_a_run_composed_with_itself_is_sampled(runs: Path) -> None:
    low, out = str(runs / "low"), str(runs / "guided")
    words = ["compose", low, low, "--labels", "null,given", "--betas", "-2,3"]
    assert run([*words, "--particles", "2", "--out", out]) == 0
    made = load_run(out)
    assert made.model.members.names == ("low (1)", "low (2)")
    assert run(["sample", out, "--num", "2", "--steps", "2", "-q"]) == 0
    both = str(runs / "average")
    words = ["compose", low, low, "--mode", "average", "--corrector", "none", "--out", both]
    assert run(words) == 0 and run(["sample", both, "--num", "2", "--steps", "2", "-q"]) == 0
