"""From the command line to files, with the real library: train, resume, sample, show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Run = Callable[..., tuple[int, str, str]]

SMALL = (
    *("dit-moe", "--data=digits", "--model.backbone.image_size=8", "--model.backbone.patch=2"),
    *("--model.backbone.trunk.depth=1", "--train.batch=8", "--train.steps=3", "-q"),
)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_train_resume_sample(coterie: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = coterie("train", *SMALL, "--out", run)
    assert code == 0, err
    assert str(run) in out
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["kind"] == "digits"
    assert config["train"]["steps"] == 3

    log = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert coterie("train", *SMALL, "--out", run)[0] == 0
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == log, "a finished run trains on"

    code, _, err = coterie("train", *SMALL, "--train.lr=0.5", "--out", run)
    assert code == 2
    assert "lr" in err

    draw = ("sample", run, "--steps", "2", "--seed", "5", "-q")
    code, out, err = coterie(*draw, "--num", "3", "--json")
    assert code == 0, err
    assert Image.open(json.loads(out)["shown"]).size[0] > 8
    first = pixels(run / "samples" / "00001.png")
    assert coterie(*draw, "--num", "2", "--out", tmp_path / "again")[0] == 0
    # A matrix product of another height may round differently: one grey level at most.
    assert abs(pixels(tmp_path / "again" / "00001.png") - first).max() <= 1
    assert abs(pixels(run / "samples" / "00002.png") - first).max() > 1


def test_show_and_list_know_every_recipe(coterie: Run) -> None:
    code, out, err = coterie("list", "--json")
    assert code == 0, err
    names = json.loads(out)
    assert all(names.values()), "a kind without a part"
    for recipe in names["recipes"]:
        for preset in ("tiny", "paper"):
            code, out, err = coterie("show", recipe, "--preset", preset, "--json")
            assert code == 0, err
            shown = json.loads(out)
            assert shown["config"]["preset"] == preset
            plan = shown["plan"]
            if "needs" in plan:  # what is trained before it, and is not there
                assert plan["needs"] and preset == "paper"
            else:
                assert 0 < plan["parameters_active"] <= plan["parameters_total"]


def test_a_run_that_is_none_is_one_line(coterie: Run, tmp_path: Path) -> None:
    code, out, err = coterie("sample", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "nothing" in err


def test_env_names_the_machine(coterie: Run) -> None:
    code, out, _ = coterie("env", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["packages"]["torch"] == found["torch"]
    assert found["threads"] >= 1


def test_data_lists_what_is_built_in_and_what_must_be_fetched(
    coterie: Run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    code, out, _ = coterie("data", "list", "--json")
    assert code == 0
    rows = {row["kind"]: row for row in json.loads(out)}
    assert rows["digits"]["cached"]
    assert not rows["cifar10"]["cached"]
    assert "cifar10" in coterie("data", "list")[1]
    code, out, _ = coterie("data", "get", "digits")
    assert code == 0 and "licence: BSD-3-Clause" in out and out.endswith("nothing to fetch\n")
    code, _, err = coterie("data", "get", "cifar11")
    assert code == 2
    assert "did you mean 'cifar10'?" in err
    monkeypatch.setenv("COTERIE_OFFLINE", "1")
    code, _, err = coterie("data", "get", "cifar10")
    assert code == 2
    assert "COTERIE_OFFLINE" in err
