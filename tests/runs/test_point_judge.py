"""Runs on point clouds: their scores with floors, their files, and their report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.core.config import override
from coterie.hub import load_pretrained
from coterie.recipes import fastdit_3d
from coterie.runs.judges import judge_of
from coterie.runs.measure.evaluation import measure
from coterie.runs.measure.report import report_run
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import start

SHORT = {
    "data.num_points": 24,
    "data.count": 12,
    "data.held_out": 9,
    "model.backbone.num_points": 24,
    "model.backbone.voxels": 8,
    "model.backbone.decoder.window": 2,
    "train.steps": 3,
    "train.batch": 3,
    "train.threads": 1,
    "sample.steps": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    out = tmp_path_factory.mktemp("clouds") / "run"
    return load_run(start(override(fastdit_3d.tiny(), SHORT), out, progress=False))


def test_the_numbers_of_a_run_are_those_of_sets_of_clouds(run: LoadedRun) -> None:
    found = measure(run)
    for score in ("one_nn_cd", "coverage_cd", "mmd_cd"):
        assert np.isfinite([found[score], found[f"{score}_floor"]]).all()
    assert found["mmd_cd"] > found["mmd_cd_floor"] > 0
    assert found["held_out_loss"] > 0 and "class_bits_last" in found


def test_the_model_folder_holds_encoder_and_decoder(run: LoadedRun) -> None:
    model = load_pretrained(run.path / "model")
    ours, theirs = run.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and any(".decoder." in name for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_clouds_are_drawn_with_the_labels_they_are_compared_with(
    run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, asked = judge_of(run), []
    draw = judge.draw
    monkeypatch.setattr(judge, "draw", lambda n, **kw: asked.append((n, kw)) or draw(n, **kw))
    assert judge.scores(500)["n"] == 9
    ((count, options),) = asked
    assert count == 9 and sorted(options["labels"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_samples_are_an_array_and_a_picture(run: LoadedRun, tmp_path: Path) -> None:
    shown = sample_run(run, 4, out=tmp_path)
    assert shown.name == "grid.png" and shown.read_bytes()[:4] == b"\x89PNG"
    assert np.load(tmp_path / "samples.npy").shape == (4, 24, 3)
    entries = json.loads((tmp_path / "samples.json").read_text())
    assert [entry["label"] for entry in entries] == [0, 1, 2, 0]


def test_the_report_shows_clouds_and_their_scores(run: LoadedRun, tmp_path: Path) -> None:
    page = report_run(run.path, tmp_path, progress=False)
    html = page.read_text(encoding="utf-8")
    assert "Point clouds drawn from the model" in html and "1-NNA by Chamfer distance" in html
    assert (tmp_path / "samples.png").is_file()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["num_samples"] == 64 and numbers["metrics"]["n"] == 9
