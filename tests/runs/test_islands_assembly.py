"""Islands as one model: refused where they do not fit, degraded where one is missing."""

import json
import shutil

import pytest
import torch

from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.prediction import Condition
from coterie.ensembles import Mixture
from coterie.recipes.common import image_tiny
from coterie.runs.islands import PartitionConfig
from coterie.runs.islands.assembly import (
    assemble,
    distil,
    distilled_config,
    router_of,
    train_router,
)
from coterie.runs.islands.plan import make_plan, read_plan
from coterie.runs.islands.workers import run_island
from coterie.runs.judges import judge_of
from coterie.runs.measure.evaluation import held_out, measured_active
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import load_run

SMALL = {"depth": 2, "width": 16, "heads": 2}
CUT = PartitionConfig(islands=2)


def base(steps=3):
    config = image_tiny("dit", steps=steps, trunk=SMALL, batch=8, threads=1)
    backbone = config.model.backbone.replace(image_size=8, patch=4)
    model = config.model.replace(backbone=backbone)
    sample = config.sample.replace(steps=2)
    return config.replace(data={"kind": "digits"}, model=model, sample=sample)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two islands and a router, each trained for three steps."""
    folder = tmp_path_factory.mktemp("together") / "plan"
    make_plan(base(), CUT, folder)
    for index in range(2):
        run_island(folder, index, progress=False)
    train_router(folder, progress=False)
    return folder


@pytest.fixture
def copied(plan, tmp_path):
    return shutil.copytree(plan, tmp_path / "plan")


def test_the_router_is_half_as_deep_and_sees_no_label(plan):
    run = load_run(plan / "router")
    backbone = run.config.model.backbone
    assert (backbone.trunk.depth, backbone.num_classes) == (1, 0)
    assert run.config.model.num_clusters == 2 and run.config.data.index is None
    judge = judge_of(run)
    found, told = judge.held_out(limit=64), judge.measures()
    assert found.loss > 0 and len(found.bins) > 3
    assert 0 <= told["cluster_accuracy"] <= 1 and 0 <= told["calibration_error"] <= 1
    with pytest.raises(ConfigError, match=r"RUN: .*a run whose model answers samples"):
        sample_run(run, num=1)
    with pytest.raises(ConfigError, match=r"model\.backbone\.kind: 'unet' .*allowed: dit"):
        from coterie.recipes.common import unet_tiny

        router_of(unet_tiny("dit"), run.config.data, 2)


def test_the_ensemble_is_a_run_like_any_other(plan, tmp_path):
    out = assemble(plan, tmp_path / "together")
    run = load_run(out)
    assert isinstance(run.model, Mixture) and run.step == 0
    assert run.model.config.prior == pytest.approx(
        [entry.samples / 1437 for entry in read_plan(plan).islands], abs=0.01
    )
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    found = held_out(run, limit=32)
    assert found.loss > 0
    assert sample_run(run, num=4).is_file()
    stored = json.loads((out / "config.json").read_text())
    members = stored["model"]["members"]
    assert [m["name"] for m in members] == ["island-0", "island-1"]
    assert all(m["model"]["origin"]["step"] == 3 for m in members)
    assert {path.name for path in out.iterdir()} == {"config.json", "samples"}, "nothing is copied"
    assert assemble(plan, out) == out, "the same call again changes nothing"


def test_full_is_the_weighted_sum_and_oracle_the_islands_own_expert(plan, tmp_path):
    full = load_run(assemble(plan, tmp_path / "full", {"kind": "dense"})).model
    oracle = load_run(assemble(plan, tmp_path / "oracle", {"kind": "oracle"})).model
    run = load_run(assemble(plan, tmp_path / "one"))
    islands = [load_run(plan / f"island-{i}").model for i in range(2)]
    batch = run.source.get(torch.arange(6).numpy())
    t = torch.linspace(0.1, 0.9, 6)
    x = run.model.process.diffuse(batch.x, torch.randn(6, 1, 8, 8), t)
    with torch.no_grad():
        probs = full.probabilities(x, t, batch.cond)[1]
        parts = torch.stack([model(x, t, batch.cond).value for model in islands])
        mixed = torch.einsum("bk,kbchw->bchw", probs, parts)
        torch.testing.assert_close(full(x, t, batch.cond).value, mixed, atol=1e-6, rtol=1e-5)
        own = parts[batch.cond.task, torch.arange(6)]
        torch.testing.assert_close(oracle(x, t, batch.cond).value, own, atol=1e-6, rtol=1e-5)
        best = parts[probs.argmax(1), torch.arange(6)]
        torch.testing.assert_close(run.model(x, t, batch.cond).value, best, atol=1e-6, rtol=1e-5)


def test_one_of_two_members_is_active_and_all_are_when_all_answer(plan, tmp_path):
    from coterie.core.cost import count_parameters

    router = count_parameters(load_run(plan / "router").model).total
    island = count_parameters(load_run(plan / "island-0").model).total
    for choice, members in (({"kind": "top_k", "k": 1}, 1), ({"kind": "dense"}, 2)):
        run = load_run(assemble(plan, tmp_path / str(members), choice))
        trace = held_out(run, limit=16).trace
        assert measured_active(run, trace) == router + members * island


def test_a_missing_island_is_refused_then_left_out_and_named(copied, tmp_path):
    shutil.rmtree(copied / "island-1")
    with pytest.raises(CheckpointError, match=r"island-1 is missing; .*--partial"):
        assemble(copied, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.warns(UserWarning, match="ensemble without island-1: nothing at"):
        out = assemble(copied, tmp_path / "some", partial=True)
    with pytest.warns(UserWarning, match="island-1"):
        run = load_run(out)
    assert run.model.missing == ("island-1",)
    cond = Condition(label=torch.zeros(3, dtype=torch.int64))
    routing = run.model(torch.zeros(3, 1, 8, 8), torch.full((3,), 0.5), cond).routings[0]
    assert set(routing.ids.flatten().tolist()) == {0}
    assert sample_run(run, num=2).is_file()


def test_islands_that_do_not_belong_together_are_refused(copied, tmp_path):
    path = copied / "island-0" / "config.json"
    whole = path.read_text()
    for change, match in (
        ({"model": {"process": {"kind": "trig"}}}, "model: process"),
        ({"data": {"index": 1}}, "data: 'island' .*allowed: island-0 of the cut"),
        ({"data": {"cut": "0" * 64}}, "trained on other samples"),
    ):
        config = json.loads(whole)
        for part, fields in change.items():
            if part == "model":
                config["model"]["process"] = {"kind": "trig"}
            else:
                config[part].update(fields)
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=match):
            assemble(copied, tmp_path / "none")
    path.write_text(whole)
    with pytest.raises(CheckpointError, match="train it: coterie island router"):
        shutil.rmtree(copied / "router")
        assemble(copied, tmp_path / "none")


def test_other_weights_than_those_assembled_are_refused(plan, tmp_path):
    path = assemble(plan, tmp_path / "together") / "config.json"
    config = json.loads(path.read_text())
    config["model"]["members"][0]["model"]["origin"]["digest"] = "0" * 64
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="island-0: holds other weights"):
        load_run(path.parent)


def test_a_student_learns_what_its_samples_island_answers(plan, tmp_path):
    from coterie.core.rng import generator

    config = distilled_config(read_plan(plan), plan)
    source = config.data.build()
    student = load_run(plan / "island-0").model
    objective = config.objective.build(student)
    own = [int(i) for i in range(200) if int(source.get([i]).cond.task[0]) == 0][:8]
    other = [int(i) for i in range(200) if int(source.get([i]).cond.task[0]) == 1][:8]
    with torch.no_grad():
        same = objective(student, source.get(own), generator(0), 1.0).total
        apart = objective(student, source.get(other), generator(0), 1.0).total
    assert float(same) == 0 < float(apart)
    out = distil(plan, tmp_path / "student", progress=False)
    run = load_run(out)
    assert run.step == 3 and held_out(run, limit=32).loss > 0
    assert "objective" not in {p.name for p in (out / "checkpoints").rglob("*.safetensors")}
