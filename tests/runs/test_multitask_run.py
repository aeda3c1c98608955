"""Several tasks from the objective to the report: on drawn ratings, and on noise levels."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coterie.core.batch import Batch
from coterie.core.config import override
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.data.ratings.rating_rows import TaskToyConfig
from coterie.hub import load_pretrained
from coterie.metrics import auc, gauc
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.measure.evaluation import measure
from coterie.runs.measure.report import report_run
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import start
from coterie.train.objectives import OBJECTIVES

TOY = TaskToyConfig(count=600, users=30, items=40, observed=(1.0, 1.0, 0.5, 0.5))
LEVELS = [
    {"shared": 1, "group": 1, "width": 8, "readers": "groups"},
    {"shared": 1, "group": 1, "task": 1, "width": 6},
]


def toy_run(**changes: Any) -> RunConfig:
    backbone = {
        "kind": "multitask",
        "fields": [{"name": f.name, "size": f.size, "columns": f.columns} for f in TOY.fields],
        "tasks": TOY.task_names,
        "groups": {"common": TOY.task_names[:2], "rare": TOY.task_names[2:]},
        "embedding": 4,
        "levels": LEVELS,
        "expert": {"kind": "norm_mlp", "feature_rank": 2},
        "self_gate": True,
    }
    run = RunConfig.from_dict(
        {
            "data": TOY.model_dump(),
            "model": {"kind": "predictor", "backbone": backbone},
            "objective": {"kind": "multitask"},
            "train": {"steps": 4, "batch": 32, "lr": 0.01, "ema": None, "threads": 1},
        }
    )
    return override(run, changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return load_run(start(toy_run(), tmp_path_factory.mktemp("tasks") / "run", progress=False))


# The objective


def test_the_loss_is_the_sum_of_each_tasks_mean_over_known_answers() -> None:
    config = toy_run()
    model = build_model(config).eval()
    objective = OBJECTIVES.parse({"kind": "multitask", "weights": {"task1": 3.0}}).build(model)
    batch = config.data.build().get(np.arange(50))
    found = objective(model, batch, torch.Generator(), 1.0)
    logits, targets = model(batch.x).value.detach(), batch.targets
    total = 0.0
    for task, name in enumerate(TOY.task_names):
        known = torch.isfinite(targets[:, task])
        assert known.all() == (task < 2)
        mean = F.binary_cross_entropy_with_logits(logits[known, task], targets[known, task])
        weight = 3.0 if name == "task1" else 1.0
        assert found.main[name].item() == pytest.approx(weight * float(mean), rel=1e-5)
        total += weight * float(mean)
    assert found.total.item() == pytest.approx(total, rel=1e-5)


def test_an_unknown_answer_teaches_nothing() -> None:
    model = build_model(toy_run())
    objective = OBJECTIVES.parse("multitask").build(model)
    batch = toy_run().data.build().get(np.arange(20))
    nothing = torch.full_like(batch.targets, math.nan)
    nothing[:, 0] = batch.targets[:, 0]
    some = Batch(batch.x, Condition(), batch.ids, nothing)
    objective(model, some, torch.Generator(), 1.0).total.backward()
    reached = model.backbone.towers.weight.grad.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [True, False, False, False]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_objectives_refuse_what_they_cannot_learn() -> None:
    model = build_model(toy_run())
    with pytest.raises(ConfigError, match=r"objective\.weights: 'task9' .*did you mean"):
        OBJECTIVES.parse({"kind": "multitask", "weights": {"task9": 1.0}}).build(model)
    batch = toy_run().data.build().get(np.arange(3))
    with pytest.raises(DataError, match="targets: None"):
        objective = OBJECTIVES.parse("multitask").build(model)
        objective(model, Batch(batch.x, batch.cond, batch.ids), torch.Generator(), 1.0)
    with pytest.raises(ConfigError, match=r"model\.backbone: 'dit' .*its answer has no tasks"):
        OBJECTIVES.parse("multitask").build(build_model(RunConfig()))


# Runs


def test_a_run_resumes_to_the_bit_with_its_statistics(tmp_path: Path) -> None:
    whole = load_run(start(toy_run(), tmp_path / "whole", progress=False))
    cut = {"train.checkpoint_every": 2}
    start(toy_run(**cut), tmp_path / "cut", progress=False)
    for checkpoint in (tmp_path / "cut" / "checkpoints").glob("*4"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    again = load_run(start(toy_run(**cut), tmp_path / "cut", progress=False))
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert any("variance" in name for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_model_directory_keeps_experts_and_statistics_together(run: LoadedRun) -> None:
    model = load_pretrained(run.path / "model").eval()
    x = run.source.get(np.arange(9)).x
    assert torch.equal(model(x).value, run.model(x).value)
    files = sorted(path.name for path in (run.path / "model" / "experts").rglob("*.safetensors"))
    assert len(files) == 3 + 7


def test_the_numbers_are_those_of_all_held_out_samples(run: LoadedRun) -> None:
    found = measure(run)
    source = run.config.data.build("held_out")
    batch = source.get(np.arange(len(source)))
    with torch.no_grad():
        logits = run.model(batch.x).value
    for task, name in enumerate(TOY.task_names):
        truth = batch.targets[:, task]
        ranked = gauc(logits[:, task], truth, source.users)
        assert found[f"gauc/{name}"] == pytest.approx(ranked.value)
        assert found[f"dropped_users/{name}"] == ranked.dropped
        assert found[f"auc/{name}"] == pytest.approx(auc(logits[:, task], truth))
        loss = F.binary_cross_entropy_with_logits(logits[:, task], truth)
        assert found[f"held_out_loss/{name}"] == pytest.approx(float(loss), rel=1e-4)
    assert found["gauc"] == pytest.approx(
        np.mean([found[f"gauc/{name}"] for name in TOY.task_names])
    )
    assert found["dropped_users/task3"] > 0
    assert found["experts_per_row"] == pytest.approx((3 + 3 + 3 + 4 * 3) / 7 / 1, rel=0.2)


def test_answers_are_written_with_the_truth_and_a_picture(run: LoadedRun, tmp_path: Path) -> None:
    shown = sample_run(run, 5, out=tmp_path)
    assert shown.name == "tasks.png" and shown.read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "answers.csv").open(encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["sample", *TOY.task_names, *(f"true {name}" for name in TOY.task_names)]
    assert len(rows) == 5 and all(0 < float(value) < 1 for row in rows for value in row[1:5])
    assert len(json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))) == 5


def test_the_report_speaks_of_tasks(run: LoadedRun) -> None:
    page = report_run(run.path, progress=False)
    text = page.read_text(encoding="utf-8")
    assert "AUC per user (GAUC), task0" in text and "task3" in text
    numbers = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert len(numbers["routing"]["routers"]) == 2


def test_the_cost_is_known_before_any_work() -> None:
    found = plan(toy_run(), measure=False)
    assert found["parameters_total"] > 0 and found["flops_per_step"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.items": 41}, r"model\.backbone\.fields"),
        ({"data.positive": [0.5, 0.1]}, r"model\.backbone\.tasks|observed"),
        ({"model.backbone.embedding": 0}, "embedding"),
        ({"data": "digits"}, r"model\.backbone"),
    ],
)
def test_data_of_another_form_are_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(toy_run(**changes), tmp_path / "run", progress=False)


def test_a_denoiser_of_tasks_is_refused() -> None:
    backbone = toy_run().model.backbone.model_dump()
    with pytest.raises(ConfigError, match="model"):
        RunConfig.from_dict({"model": {"kind": "denoiser", "backbone": backbone}})
    with pytest.raises(ConfigError, match="a backbone that answers tasks"):
        RunConfig.from_dict({"model": {"kind": "predictor", "backbone": {"kind": "dit"}}})
