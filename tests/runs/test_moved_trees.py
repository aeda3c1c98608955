"""Trees of runs and plans that are moved, or looked at from another folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coterie.core.config import override
from coterie.core.errors import CheckpointError, CoterieError, DataError
from coterie.core.paths import beside, placed, relative
from coterie.data import SOURCES
from coterie.ensembles import EnsembleModelConfig, MemberConfig
from coterie.runs.config import RunConfig
from coterie.runs.islands.partition import PartitionConfig
from coterie.runs.islands.plan import FILE, make_plan, read_plan
from coterie.runs.islands.workers import run_island, status
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import prepare, start
from coterie.train.run_directory import RunDir, stored_hash
from small_models import small
from small_runs import finished, short


def test_G11_paths_in_files_and_in_memory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    for place in (tmp_path / "runs" / "b", tmp_path / "plan" / "island-0", run / "model"):
        text = relative(str(place), run)
        assert not Path(text).is_absolute() and placed(text, run) == str(place)
    assert relative("~/x", run) == "~/x" == placed("~/x", run)
    assert relative("/elsewhere/x", "/runs/a") == "/elsewhere/x" == placed("/elsewhere/x", run)


def test_G11_a_plan_made_with_a_relative_path_runs_from_anywhere_and_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    by_class = PartitionConfig.from_dict({"islands": 2, "by": "labels"})
    make_plan(short("dit-moe"), by_class, Path("plan"))
    make_plan(short("dit-moe"), by_class, tmp_path / "a" / "plan")  # the same, said otherwise
    make_plan(short("dit-moe"), by_class, Path("alone"), export=True)
    monkeypatch.chdir(tmp_path)
    run_island("a/plan", 0, progress=False)
    shutil.move(tmp_path / "a", tmp_path / "b")
    run_island("b/plan", 0, progress=False)  # resumes
    run_island(tmp_path / "b" / "plan", 1, progress=False)
    run_island("b/alone", 1, progress=False)
    assert [row["state"] for row in status("b/plan")] == ["done", "done"]
    config = json.loads((tmp_path / "b" / "plan" / "island-0" / "config.json").read_text())
    assert config["data"]["path"] == "../partition"


def ensemble(out: Path, members: list[Path]) -> Path:
    named = tuple(
        MemberConfig(name=path.name, model=PretrainedConfig(path=str(path)).pinned())
        for path in members
    )
    parts: dict[str, Any] = {"ensemble": {"kind": "noise_ranges", "boundaries": [0.5]}}
    model = EnsembleModelConfig.from_dict({**parts, "members": named})
    base = short("dit-moe")
    return start(base.replace(model=model, train=base.train.replace(steps=0)), out)


def test_G11_runs_that_name_others_are_moved_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    finished("dit-moe", Path("runs/base"), train__steps=1)
    finished("dit-moe", Path("runs/next"), train__steps=1, init__path="runs/base")
    adapted = {"init.adapters": [{"name": "a", "lora": {"rank": 2, "targets": ["*.attention.*"]}}]}
    base = override(short("dit-moe", train__steps=1, init__path="runs/base"), adapted)
    start(base, Path("runs/adapted"), progress=False)
    ensemble(Path("runs/pair"), [Path("runs/base"), Path("runs/next")])
    before = stored_hash(Path("runs/adapted"))
    monkeypatch.chdir(tmp_path)
    shutil.move(there, tmp_path / "here")
    moved = tmp_path / "here" / "runs"
    for name in ("next", "adapted"):
        config = RunDir(moved / name).read_config(RunConfig)
        assert config.init is not None and config.init.path == str(moved / "base")
        load_run(moved / name)
        start(config, moved / name, progress=False)
    load_run(moved / "pair")
    assert stored_hash(moved / "adapted") == before
    shutil.move(moved / "base", tmp_path / "gone")
    with pytest.raises(CoterieError, match=str(moved / "base")):
        load_run(moved / "adapted")


def test_H_a_plan_names_folders_inside_itself_only(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    make_plan(short("dit-moe"), PartitionConfig.from_dict({"islands": 2, "by": "labels"}), folder)
    plan = json.loads((folder / FILE).read_text())
    for name in ("../outside", "/outside", "island-0/../..", "", "island-x", "island-0\n"):
        plan["islands"][1]["folder"] = name
        (folder / FILE).write_text(json.dumps(plan))
        with pytest.raises((CheckpointError, CoterieError), match=r"islands\.1\.folder"):
            read_plan(folder)


def test_H_a_plan_clears_away_what_a_killed_one_left(tmp_path: Path) -> None:
    by_class = PartitionConfig.from_dict({"islands": 2, "by": "labels"})
    for name in (".tmp-partition-99", ".tmp-partition-of-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-islands.json-99").write_text("{")
    make_plan(short("dit-moe"), by_class, tmp_path)
    left = {path.name for path in tmp_path.glob(".tmp-*")}
    assert left == {".tmp-partition-of-mine"}


def write_album(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def of_album(path: Path | str) -> RunConfig:
    """The smallest run on pictures of one's own."""
    base = small("dit-moe")
    backbone = base.model.backbone.replace(image_size=8, patch=4, channels=3, num_classes=2)
    data = {"kind": "image-folder", "path": str(path), "size": 8, "held_out_one_in": 3}
    train = base.train.replace(steps=2, batch=4)
    return base.replace(model=base.model.replace(backbone=backbone), data=data, train=train)


def test_G11_a_run_is_moved_together_with_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    write_album(there / "album")
    monkeypatch.chdir(there)
    config = of_album("album")
    prepare(config, Path("runs/a"))
    make_plan(config, PartitionConfig.from_dict({"islands": 2, "by": "labels"}), Path("plan"))
    monkeypatch.chdir(tmp_path)
    shutil.move(there, tmp_path / "here")
    run = tmp_path / "here" / "runs" / "a"
    start(RunDir(run).read_config(RunConfig), run, progress=False)
    start(of_album("here/album"), Path("here/runs/a"), progress=False)  # the same, said otherwise
    assert load_run(run).step == 2
    run_island("here/plan", 0, progress=False)
    stored = json.loads((run / "config.json").read_text())
    assert stored["data"]["path"] == "../../album"


def test_G11_an_absolute_path_of_data_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_album(tmp_path / "album")
    monkeypatch.chdir(tmp_path)
    start(of_album(tmp_path / "album"), Path("a"), progress=False)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_run(tmp_path / "a").config.data.path == str(tmp_path / "album")
    assert relative("/elsewhere/album", tmp_path / "a") == "/elsewhere/album"


SOURCES_OF_FILES = (
    *("image-folder", "pairs-folder", "cloud-folder", "latents", "demonstrations", "shard"),
)


@pytest.mark.parametrize("kind", SOURCES_OF_FILES)
def test_G11_every_source_of_files_is_placed(kind: str, tmp_path: Path) -> None:
    given = SOURCES.parse({"kind": kind, "path": str(tmp_path / "data")})
    with beside(tmp_path / "runs" / "a"):
        stored = given.model_dump(mode="json")
        assert stored["path"] == "../../data"
        assert SOURCES.parse(stored) == given


def test_G5_a_tilde_without_a_home_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    for kind in SOURCES_OF_FILES:
        with pytest.raises(DataError, match=r"path: '~/data' .*no home folder here$"):
            SOURCES.parse({"kind": kind, "path": "~/data"}).build()
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"path: '~nobody-at-all/x' .*no home folder here$"):
        SOURCES.parse({"kind": "latents", "path": "~nobody-at-all/x"}).build()


def test_G5_a_tilde_is_the_home_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    episodes = {
        "observations": np.zeros((20, 3), np.float32),
        "actions": np.zeros((20, 2)),
        "lengths": np.full(5, 4),
    }
    np.savez(tmp_path / "x.npz", **episodes)
    assert len(SOURCES.parse({"kind": "demonstrations", "path": "~/x.npz"}).build())
