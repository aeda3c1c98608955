"""Folders of others: what is no class, names that are no text, and runs whose data changed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coterie.core.config import override
from coterie.core.errors import CoterieError, DataError
from coterie.core.folder import MANIFEST
from coterie.data import SOURCES, Subset, build_source
from coterie.data.download.cache import problem, save_array, write_folder
from coterie.data.sample_files import DataWarning
from coterie.data.source import changed, identity
from coterie.recipes import get_recipe
from coterie.runs.islands.partition import PartitionConfig, partition_of
from coterie.runs.measure.evaluation import held_out
from coterie.runs.trained_run import load_run
from coterie.runs.training import prepare, start
from coterie.train import checkpoint

LITTER = (".git", "__MACOSX", ".ipynb_checkpoints", ".thumbnails", "empty")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "album" / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "album" / name / f"{index}.png")
    return tmp_path / "album"


def put_litter(album: Path) -> None:
    for name in LITTER:
        (album / name).mkdir()
        if name != "empty":
            Image.new("RGB", (8, 8)).save(album / name / "x.png")
    (album / "cat" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(album / "cat" / ".ipynb_checkpoints" / "0.png")
    (album / "dog" / "._0.png").write_bytes(b"resource fork")
    (album / "dog" / "_1.png").write_bytes((album / "dog" / "1.png").read_bytes())


def folder(album: Path, split: str = "train", **fields: Any) -> Any:
    return build_source({"kind": "image-folder", "path": str(album), "size": 8, **fields}, split)


def test_A8_folders_of_systems_are_no_classes(album: Path) -> None:
    before = folder(album)
    put_litter(album)
    with pytest.warns(DataWarning, match="no classes: " + ", ".join(sorted(LITTER))):
        source = folder(album)
    assert source.class_names == ("cat", "dog")
    assert len(source) in (len(before), len(before) + 1)  # _1.png is a picture as any other
    source.get(np.arange(len(source)))  # none of it is litter


def test_A8_clouds_and_pairs_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (".git", "_old", "ball", "none"):
        (tmp_path / "clouds" / name).mkdir(parents=True)
    for name in (".git", "_old", "ball"):
        for index in range(9):
            np.save(tmp_path / "clouds" / name / f"{index}.npy", rng.normal(size=(20, 3)))
    options = {"kind": "cloud-folder", "path": str(tmp_path / "clouds"), "num_points": 8}
    with pytest.warns(DataWarning, match=r"\.git, _old, none"):
        assert build_source(options).class_names == ("ball",)
    for name in ("__MACOSX", "rain", "snow"):
        for part in ("input", "gt"):
            (tmp_path / "pairs" / name / part).mkdir(parents=True)
            if name != "snow":
                for index in range(9):
                    Image.new("RGB", (9, 9)).save(tmp_path / "pairs" / name / part / f"{index}.png")
    (tmp_path / "pairs" / "rain" / "input" / "._0.png").write_bytes(b"resource fork")
    options = {"kind": "pairs-folder", "path": str(tmp_path / "pairs"), "size": 8}
    with pytest.warns(DataWarning, match="__MACOSX, snow"):
        assert build_source(options).class_names == ("rain",)
    Image.new("RGB", (9, 9)).save(tmp_path / "pairs" / "rain" / "gt" / "0.jpg")
    with pytest.raises(DataError, match=r"0\.jpg and .*0\.png: two pictures of one name"):
        build_source(options)


def bad_name(parent: Path) -> Path:
    return parent / os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("where", ["class", "file", "root"])
def test_G12_a_name_that_is_no_text_is_refused_escaped(album: Path, where: str) -> None:
    if where == "class":
        (album / "dog").rename(bad_name(album))
    elif where == "file":
        (album / "dog" / "0.png").rename(bad_name(album / "dog").with_suffix(".png"))
    else:
        album = album.rename(bad_name(album.parent))
    with pytest.raises(DataError, match=r"caf\\xe9.*allowed: a name in UTF-8"):
        folder(album)


def small_run(path: Path) -> Any:
    return override(
        get_recipe("dit-moe").config("tiny"),
        {
            "data": {"kind": "image-folder", "path": str(path), "size": 8},
            "model.backbone.image_size": 8,
            "model.backbone.patch": 4,
            "model.backbone.channels": 3,
            "model.backbone.num_classes": 2,
            "model.backbone.trunk.depth": 1,
            "train.steps": 2,
            "train.batch": 4,
        },
    )


def test_G12_a_run_directory_without_a_text_name_is_refused(album: Path) -> None:
    with pytest.raises(CoterieError, match=r"run: '.*caf\\xe9'.*UTF-8"):
        start(small_run(album), bad_name(album.parent), progress=False)
    assert not bad_name(album.parent).exists()


def remove(album: Path) -> None:
    (album / "cat" / "0.png").unlink()
    (album / "cat" / "1.png").unlink()
    (album / "cat" / "2.png").unlink()


def add(album: Path) -> None:
    for index in range(9):
        Image.new("RGB", (8, 8)).save(album / "dog" / f"new-{index}.png")


def rename_class(album: Path) -> None:
    (album / "dog").rename(album / "wolf")


def replace_one(album: Path) -> None:
    Image.new("RGB", (30, 30)).save(album / "dog" / "5.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (remove, r"\d+ samples then, \d+ now"),
        (add, r"\d+ samples then, \d+ now"),
        (rename_class, "gone: dog; new: wolf|samples then"),
        (replace_one, "files or values are others than then"),
    ],
)
def test_G9_a_run_whose_pictures_changed_does_not_go_on(
    album: Path, change: Any, told: str
) -> None:
    config = small_run(album)
    run = prepare(config, album.parent / "run")
    change(album)
    with pytest.raises(DataError, match=rf"data are not those that training began with: .*{told}"):
        start(config, run, progress=False)
    assert checkpoint.steps(run)[-1][0] == 0


def test_G9_a_run_whose_pictures_are_the_same_goes_on(album: Path) -> None:
    config = small_run(album)
    run = prepare(config, album.parent / "run")
    os.utime(album / "dog" / "0.png", (0, 0))  # copied elsewhere, say
    start(config, run, progress=False)
    found = checkpoint.load_latest(run)
    assert found is not None and found.step == 2
    assert found.scalars["data"]["classes"] == ["cat", "dog"]


def test_G9_values_of_latents_count(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(40, 1, 2, 2)).astype(np.float32)
    np.save(tmp_path / "labels.npy", np.zeros(40, np.int64))
    np.save(tmp_path / "latents.npy", values)
    before = identity(build_source({"kind": "latents", "path": str(tmp_path)}))
    values[7] += 1
    np.save(tmp_path / "latents.npy", values)
    source = build_source({"kind": "latents", "path": str(tmp_path)})
    assert "files or values" in changed(before, identity(source))
    assert identity(Subset(source, [0]))["fingerprint"] == identity(source)["fingerprint"] != ""


def test_G9_a_partition_is_of_the_pictures_that_are_there(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_CACHE", str(album.parent / "cache"))
    data = SOURCES.parse(
        {"kind": "image-folder", "path": str(album), "size": 8, "held_out_one_in": 3}
    )
    cut = PartitionConfig(islands=2, by="labels")
    before = partition_of(data, cut)
    assert partition_of(data, cut).digest == before.digest
    for name in ("7", "8", "9"):  # as many as before, of other classes
        (album / "cat" / f"{name}.png").rename(album / "dog" / f"x{name}.png")
    source, after = data.build("train"), partition_of(data, cut)
    labels = source.get(np.arange(len(source))).cond.label.numpy()
    np.testing.assert_array_equal(after.train, labels)


def test_G9_cached_arrays_are_hashed(tmp_path: Path) -> None:
    target = tmp_path / "set"
    write_folder(target, lambda work: save_array(work, "x", np.zeros(100, np.uint8)))
    assert problem(target, deep=True) is None
    with (target / "x.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert "SHA-256" in str(problem(target, deep=True))


@pytest.mark.filterwarnings("ignore::coterie.core.folder.FolderWarning")
def test_H_litter_of_systems_damages_no_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, {}, {}, step=1)
    for name in (".DS_Store", ".nfs000000000012", "._manifest.json", "Thumbs.db"):
        (path / name).write_bytes(b"x")
    assert checkpoint.verify(path)["step"] == 1
    (path / "other.safetensors").write_bytes(b"x")
    with pytest.raises(CoterieError, match=f"other.safetensors: not listed in {MANIFEST}"):
        checkpoint.verify(path)


def test_G9_whoever_reads_the_data_of_a_run_is_told_that_they_changed(album: Path) -> None:
    config = override(small_run(album), {"data.held_out_one_in": 3})
    run = start(config, album.parent / "run", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_run(run)
    replace_one(album)
    with pytest.warns(DataWarning, match=r"not those that it was trained on: files or val") as told:
        held_out(load_run(run), limit=8)
    assert len([one for one in told if one.category is DataWarning]) == 1
