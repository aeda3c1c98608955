"""Judges: who is asked, and that a restoration run is measured, sampled and reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.core.errors import ConfigError
from coterie.data.images import photos
from coterie.data.images.photos import CROP, PhotosConfig
from coterie.data.source import ArraySource
from coterie.denoiser import DenoiserConfig
from coterie.metrics.calibration import router_calibration
from coterie.metrics.restoration import psnr
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.judges import JUDGES, judge_of
from coterie.runs.judges.base import by_class, judges
from coterie.runs.judges.restoration import use_of, without_experts
from coterie.runs.measure import report
from coterie.runs.measure.evaluation import flat, measure
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import start
from coterie.train.config import TrainConfig
from coterie.train.objectives import RestorationConfig
from small_models import SMALL_RESTORER


def smooth_photos(self: PhotosConfig, split: str = "train") -> ArraySource:
    ramp = np.linspace(20, 230, CROP, dtype=np.uint8)
    data = np.stack([np.broadcast_to(np.roll(ramp, 7 * i), (3, CROP, CROP)) for i in range(5)])
    return ArraySource(
        "photos", "image", data, shape=(3, CROP, CROP), licence="", transform=self.transform
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos.PhotosConfig, "build", smooth_photos)
        config = RunConfig(
            data={"kind": "weather", "size": 16, "count": 80},
            model=DenoiserConfig.from_dict({"backbone": SMALL_RESTORER, "view": "x0"}),
            objective=RestorationConfig(),
            train=TrainConfig(steps=5, batch=8, lr=1e-3, threads=1),
        )
        folder = tmp_path_factory.mktemp("restoration") / "run"
        return load_run(start(config, folder, progress=False))


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.PhotosConfig, "build", smooth_photos)


def test_restored_pictures_are_scored_beside_the_degraded_ones(run: LoadedRun) -> None:
    found = measure(run)
    batch = judge_of(run)._batch(8)  # type: ignore[attr-defined]
    assert len(batch.ids) == 8
    given = psnr(batch.cond.channels, batch.x)
    assert found["psnr_floor"] == pytest.approx(float(given.mean()), rel=1e-6)
    rain = float(given[batch.cond.label == 0].mean())
    assert found["psnr/rain_floor"] == pytest.approx(rain, rel=1e-6)
    assert {"ssim", "psnr/snow", "held_out_loss/haze"} <= set(found)
    again = measure(run)
    assert again.pop("milliseconds") > 0 and again.pop("time_over_dense") > 0
    assert again == {name: value for name, value in found.items() if name in again}


def test_the_router_is_judged_as_a_classifier_of_weather(run: LoadedRun) -> None:
    """By hand, on the eight held-out pictures: experts are matched on four, judged on four."""
    judge = judge_of(run)
    batch = judge._batch(8)  # type: ignore[attr-defined]
    with torch.no_grad():
        (routing,) = run.model(batch.cond.channels, torch.zeros(8), batch.cond).routings
    use = np.zeros((8, 3))
    for row, (ids, gates) in enumerate(zip(routing.ids.tolist(), routing.gates.tolist())):
        for expert, gate in zip(ids, gates):
            use[row // 4, expert] += gate / 4
    np.testing.assert_allclose(use_of(routing), use, atol=1e-6)
    want = router_calibration(use, batch.cond.label.numpy(), 4)
    found = judge.scores(8)
    assert (found["router_accuracy"], found["router_calibration_error"]) == pytest.approx(want)


def test_without_experts_there_is_no_router_to_judge_and_time_is_that_of_a_dense_network(
    run: LoadedRun,
) -> None:
    backbone = run.config.model.backbone
    bare = run.config.replace(model=run.config.model.replace(backbone=without_experts(backbone)))
    dense = dataclasses.replace(run, config=bare, model=build_model(bare).eval())
    found = judge_of(dense).scores(8)
    assert "router_accuracy" not in found and 0.3 < found["time_over_dense"] < 3


def test_its_samples_are_three_pictures_side_by_side(run: LoadedRun, tmp_path: Path) -> None:
    shown = sample_run(run, num=6, out=tmp_path)
    assert shown == tmp_path / "grid.png"
    one = np.asarray(Image.open(tmp_path / "00000.png"))
    assert one.shape == (16, 48, 3)
    clean = (judge_of(run)._batch(6).x[0].permute(1, 2, 0) + 1) * 127.5  # type: ignore[attr-defined]
    assert np.abs(one[:, 32:].astype(float) - clean.numpy()).max() < 1
    entries = json.loads((tmp_path / "samples.json").read_text())
    assert [entry["file"] for entry in entries][:2] == ["00000.png", "00001.png"]


def test_its_report_needs_no_code_of_its_own(
    run: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SHOWN", 4)
    monkeypatch.setattr(report, "SCORED", 8)
    page = report.report_run(run.path, tmp_path / "report", progress=False)
    found = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    assert found["num_samples"] == 4 and found["class_names"] == ["rain", "drops", "snow", "haze"]
    assert found["metrics"]["psnr"].keys() == {"value", "floor", "floor_of"}
    assert len(found["routing"]["routers"]) == 1 and found["loss_by_noise"] == []
    text = page.read_text(encoding="utf-8")
    assert text.count("the degraded pictures") == 3  # two sentences, and under the table
    assert "pictures: degraded, restored, clean" in text and "real held-out" not in text


def test_scores_become_plain_numbers() -> None:
    scores = {"psnr": {"value": 20.0, "floor": 15}, "ms": 3.5, "extractor": "net", "n": 500}
    assert flat(scores) == {"psnr": 20.0, "psnr_floor": 15.0, "ms": 3.5}
    values = np.array([1.0, 2.0, 5.0])
    assert by_class(values, [1, 0, 1], ("a", "b")) == {"a": 2.0, "b": 3.0}
    assert by_class(values, [], ()) == {}


def test_every_modality_of_a_source_has_one_judge(run: LoadedRun) -> None:
    assert {"image", "text", "vector", "restoration"} <= set(JUDGES)
    with pytest.raises(ValueError, match="'image' has two judges"):
        judges("image")(JUDGES["text"])
    lost = LoadedRun(run.path, run.config, run.model, _Smells(), run.step)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="modality: 'smell'"):
        judge_of(lost)


class _Smells:
    modality = "smell"
