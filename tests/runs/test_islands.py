"""Islands: one cut, ordinary runs, nothing shared."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coterie.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from coterie.data import build_source
from coterie.recipes.common import image_tiny
from coterie.runs.islands import IslandConfig, PartitionConfig, partition_of
from coterie.runs.islands.plan import make_plan, preview, read_plan, shared_budget
from coterie.runs.islands.workers import job_files, run_all, run_island, status

SMALL = {"depth": 1, "width": 16, "heads": 2}
BY_CLASS = PartitionConfig(islands=2, by="labels")


def base(steps=4, **changes):
    """Digits of 8 x 8: fast, and in the package."""
    config = image_tiny("dit", steps=steps, trunk=SMALL, batch=8, threads=1, **changes)
    backbone = config.model.backbone.replace(image_size=8, patch=4)
    model = config.model.replace(backbone=backbone)
    return config.replace(data={"kind": "digits"}, model=model)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", "metrics.jsonl")
    }


def weights(run: Path) -> dict[str, str]:
    learnt = ("model/", "checkpoints/")
    return {
        name: sha
        for name, sha in files(run).items()
        if name.startswith(learnt) and name.endswith(".safetensors")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two islands one after the other, and the plan they belong to."""
    folder = tmp_path_factory.mktemp("islands") / "plan"
    make_plan(base(), BY_CLASS, folder, budget="batch")
    for index in range(2):
        run_island(folder, index, progress=False)
    return folder


@pytest.mark.parametrize("by", ["features", "labels", "random"])
def test_islands_are_disjoint_complete_and_always_the_same(by):
    data = base().data
    config = PartitionConfig(islands=3, by=by)
    islands = partition_of(data, config)
    again = partition_of(data, config)
    whole = build_source(data)
    assert islands.sha256 == again.sha256 and islands.counts.sum() == len(whole)
    assert np.isclose(islands.prior.sum(), 1)
    rows = [IslandConfig(data=data, partition=config, index=i).build() for i in range(3)]
    ids = np.concatenate([part.get(np.arange(len(part))).ids.numpy() for part in rows])
    assert sorted(ids) == list(range(len(whole)))


def test_clusters_of_features_place_new_samples():
    data, config = base().data, PartitionConfig(islands=3)
    placed = IslandConfig(data=data, partition=config).build("held_out")
    batch = placed.get(np.arange(64))
    assert np.array_equal(placed.place(batch.x), batch.cond.task.numpy())
    assert placed.task_names == ("island 0", "island 1", "island 2")
    assert IslandConfig(data=data, partition=BY_CLASS).build().place(batch.x) is None


def test_clusters_follow_subjects_and_chance_does_not():
    data = base().data
    whole = build_source(data)
    labels = whole.get(np.arange(len(whole))).cond.label.numpy()

    def purity(by):
        islands = partition_of(data, PartitionConfig(islands=5, by=by)).train
        return sum(np.bincount(labels[islands == i]).max() for i in range(5)) / len(labels)

    assert purity("features") > 0.4 and purity("random") < 0.2


def test_another_cut_is_refused():
    data = base().data
    mine = partition_of(data, BY_CLASS).digest
    IslandConfig(data=data, partition=BY_CLASS, index=0, cut=mine).build()
    with pytest.raises(CheckpointError, match="these samples were cut into other islands"):
        IslandConfig(data=data, partition=BY_CLASS, index=0, cut="0" * 64).build()
    with pytest.raises(ConfigError, match=r"index: 2 .*allowed: 0\.\.1"):
        IslandConfig.from_dict({"data": data, "partition": BY_CLASS, "index": 2})
    with pytest.raises(ConfigError, match=r"partition\.by: 'features of text'"):
        partition_of(build_config("pydoc-topics"), PartitionConfig(islands=2))
    with pytest.raises(ConfigError, match=r"partition\.islands: 11 .*the 10 classes"):
        partition_of(data, PartitionConfig(islands=11, by="labels"))


def build_config(kind):
    from coterie.data import SOURCES

    return SOURCES.parse({"kind": kind})


def test_budgets_add_up_to_one_model(tmp_path):
    config = base(steps=40)
    for name, value in (("batch", 4), ("steps", 20)):
        share = shared_budget(config, 2, name)
        assert getattr(share.train, name) == value
        assert 2 * share.train.steps * share.train.batch == 40 * 8
    assert shared_budget(config, 2, "each") == config
    with pytest.raises(ConfigError, match=r"train\.batch: 8 .*a multiple of 3 islands"):
        make_plan(config, PartitionConfig(islands=3), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    told = preview(config, BY_CLASS, "batch")
    assert sum(told["samples"]) == len(build_source(config.data)) and told["batch"] == 4


def test_a_plan_is_what_it_was(trained, tmp_path):
    plan = read_plan(trained)
    assert [entry.samples for entry in plan.islands] == [
        len(plan.data(trained, index).build()) for index in range(2)
    ]
    assert make_plan(base(), BY_CLASS, trained) == plan
    with pytest.raises(ConfigError, match=r"another configuration|another plan"):
        make_plan(base(steps=8), BY_CLASS, trained)
    with pytest.raises(CheckpointError, match="another partition"):
        make_plan(base(), BY_CLASS.replace(by="random"), trained)
    with pytest.raises(ConfigError, match=r"PLAN: .*islands\.json"):
        read_plan(tmp_path)
    rows = status(trained)
    assert [(row["state"], row["step"]) for row in rows] == [("done", 4), ("done", 4)]
    assert all(row["loss"] > 0 for row in rows)


def test_one_after_another_equals_at_once(trained, tmp_path):
    make_plan(base(), BY_CLASS, tmp_path / "plan")
    run_all(tmp_path / "plan", jobs=2)
    for index in range(2):
        there, here = (folder / f"island-{index}" for folder in (trained, tmp_path / "plan"))
        assert weights(there) == weights(here) != {}


def test_an_island_needs_its_own_samples_only(trained, tmp_path):
    make_plan(base(), BY_CLASS, tmp_path / "plan", export=True)
    shutil.rmtree(tmp_path / "plan" / "partition")
    shutil.rmtree(tmp_path / "plan" / "island-0")
    run_island(tmp_path / "plan", 1, progress=False)
    assert weights(trained / "island-1") == weights(tmp_path / "plan" / "island-1")
    shard = tmp_path / "plan" / "island-1" / "shard" / "train.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"data\.path: .*a whole shard"):
        run_island(tmp_path / "plan", 1, progress=False)


def test_a_killed_island_leaves_the_others_alone_and_resumes(tmp_path):
    folder = tmp_path / "plan"
    make_plan(
        base(steps=4000, checkpoint_every=5), BY_CLASS, folder, changes={0: {"train.steps": 4}}
    )
    run_island(folder, 0, progress=False)
    before = files(folder / "island-0")
    imported = "from coterie.runs.islands.workers import run_island"
    code = f"{imported}; run_island({str(folder)!r}, 1, False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not list((folder / "island-1" / "checkpoints").glob("[!.]*")):
        time.sleep(0.05)
        assert process.poll() is None
    assert status(folder)[1]["state"] == "running"
    process.kill()
    process.wait()
    assert files(folder / "island-0") == before
    row = status(folder)[1]
    assert row["state"] == "stopped" and row["step"] >= 5


def test_an_island_that_fails_is_named_and_the_others_go_on(tmp_path):
    folder = tmp_path / "plan"
    make_plan(base(), BY_CLASS, folder)
    (folder / "island-0" / "config.json").write_text("{")
    with pytest.raises(TrainingError, match=r"1 of 2 failed: island 0: .*not valid JSON"):
        run_all(folder, jobs=2)
    assert (folder / "island-1" / "model").is_dir()
    assert "not valid JSON" in (folder / "island-0.log").read_text()
    with pytest.raises(ConfigError, match=r"jobs: 0 .*1 or more"):
        run_all(folder, jobs=0)


def test_unequal_islands_and_job_files(tmp_path):
    folder = tmp_path / "plan"
    changes = {1: {"model.backbone.trunk.depth": 2}}
    make_plan(base(), BY_CLASS, folder, changes=changes)
    depths = [
        json.loads((folder / f"island-{i}" / "config.json").read_text())["model"]["backbone"][
            "trunk"
        ]["depth"]
        for i in range(2)
    ]
    assert depths == [1, 2]
    slurm, first, _ = job_files(folder, ("slurm", "skypilot"))
    assert "--array=0-1" in slurm.read_text() and "--index 0" in first.read_text()
    with pytest.raises(ConfigError, match=r"island: 2 .*allowed: 0\.\.1"):
        make_plan(base(), BY_CLASS, tmp_path / "other", changes={2: {}})
