"""A run among accidents: files and links of others, changed configurations, trainers beside."""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.core.errors import CheckpointError, ConfigError, TrainingError
from coterie.core.folder import FolderWarning
from coterie.hub import save_pretrained
from coterie.runs import training
from coterie.runs.measure.report import report_run
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from coterie.train import RunDir, Trainer, checkpoint, load_weights, resume
from coterie.train.checkpoint import CheckpointWarning
from small_runs import finished, short
from toy_training import ToyModel, ToyObjective, ToySource, toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("dit-moe", tmp_path_factory.mktemp("faults") / "run")


def toy(path: Path, **changes: Any) -> Path:
    Trainer(toy_config(**changes), ToyModel(), ToyObjective(), ToySource(), 3, path).fit(False)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_F1_samples_leave_the_pictures_of_others(run: Path, tmp_path: Path) -> None:
    loaded, folder = load_run(run), tmp_path / "album"
    folder.mkdir()
    for name in ("00000.png", "00999.png", "notes.txt"):
        (folder / name).write_text("theirs")
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"out: .*album.* without 00000\.png"):
        sample_run(loaded, 2, out=folder)
    assert contents(folder) == before
    shutil.move(folder / "00000.png", folder / "first.png")
    shutil.move(folder / "00999.png", folder / "last.png")
    sample_run(loaded, 3, out=folder)
    sample_run(loaded, 2, out=folder)
    ours = {"00000.png", "00001.png", "grid.png", "samples.json"}
    assert contents(folder).keys() == ours | {"first.png", "last.png", "notes.txt"}
    assert (folder / "last.png").read_text() == "theirs"


def test_F1_a_report_leaves_the_page_of_others(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text("their home page")
    with pytest.raises(ConfigError, match=r"out: .* without index\.html"):
        report_run(run, tmp_path, progress=False)
    assert page.read_text() == "their home page"


def test_F1_training_beside_others_removes_its_own_leftovers_only(tmp_path: Path) -> None:
    kept = {".tmp-thesis": "theirs", ".tmp-thesis-2": "theirs"}
    for name, text in kept.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter").write_text(text)
    (tmp_path / ".tmp-metrics.jsonl-77").write_text("ours, torn")
    toy(tmp_path)
    assert all((tmp_path / name / "chapter").read_text() == text for name, text in kept.items())
    assert not (tmp_path / ".tmp-metrics.jsonl-77").exists()


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "checkpoints", "model", "config.json"])
def test_G1_links_in_a_run_are_refused(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    if name in ("checkpoints", "model"):
        precious.mkdir()
        (precious / ".tmp-step-00000001-5").write_text("theirs")
    else:
        precious.write_text("theirs\n")
    before = contents(tmp_path) or precious.read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    with pytest.raises(TrainingError, match=f"{re.escape(name)}: a link to .*precious"):
        toy(run)
    (run / name).unlink()
    shutil.rmtree(run)
    assert (contents(tmp_path) or precious.read_bytes()) == before


def test_G1_samples_and_reports_follow_no_links(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    precious = tmp_path / "precious"
    precious.write_text("theirs")
    for folder, name in (("samples", "grid.png"), ("report", "index.html")):
        (copy / folder).mkdir(exist_ok=True)
        (copy / folder / name).symlink_to(precious)
    with pytest.raises(ConfigError, match=r"grid\.png: a link"):
        sample_run(load_run(copy), 2)
    with pytest.raises(ConfigError, match=r"index\.html: a link"):
        report_run(copy, progress=False)
    assert precious.read_text() == "theirs"


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "sample and sweep": lambda run, _: load_run(run),
    "report": lambda run, out: report_run(run, out / "report", progress=False),
    "init.path": lambda run, out: start(
        short("dit-moe", init__path=str(run)), out / "next", progress=False
    ),
    "ensembles": lambda run, _: PretrainedConfig(path=str(run)).pinned(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_G6_a_changed_configuration_is_noticed_by_every_reader(
    run: Path, tmp_path: Path, read: Callable[[Path, Path], Any]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["seed"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"configuration \w+, this run is \w+; put"):
        read(copy, tmp_path)
    config["seed"] -= 1
    config["train"]["log_every"] += 1  # what a resumed run may change
    (copy / "config.json").write_text(json.dumps(config))
    load_run(copy)


def test_H_samples_while_a_trainer_keeps_one_checkpoint(tmp_path: Path) -> None:
    path = toy(tmp_path, steps=4, checkpoint_every=1, keep=1)
    stop, problems = threading.Event(), []
    state = checkpoint.load(checkpoint.latest(path))  # type: ignore[arg-type]
    known = {"step": 5, "config_hash": state.config_hash, "keep": 1}

    def train() -> None:
        for step in range(5, 400):
            if stop.is_set():
                return
            checkpoint.save(path, state.state, state.scalars, **{**known, "step": step})

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged, so nothing is said
            for _ in range(40):
                try:
                    load_weights(path, ToyModel(), "model")
                except (CheckpointError, OSError, UserWarning) as error:
                    problems.append(error)
    finally:
        stop.set()
        trainer.join()
    assert not problems


def test_H_a_checkpoint_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy(tmp_path, steps=4, keep=1)
    first = checkpoint.load(checkpoint.latest(path))  # type: ignore[arg-type]
    verify, seen = checkpoint.verify, []

    def replaced(folder: Path) -> dict[str, Any]:
        if not seen:  # the trainer is faster, once
            checkpoint.save(
                path, first.state, first.scalars, step=9, config_hash=first.config_hash, keep=1
            )
        seen.append(folder.name)
        return verify(folder)

    monkeypatch.setattr(checkpoint, "verify", replaced)
    assert load_weights(path, ToyModel(), "model").step == 9
    assert seen == ["step-00000004", "step-00000009"]


def test_H_the_model_is_exported_inside_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    export = training._export

    def watched(model: Any, config: Any, run_dir: RunDir, source: Any) -> None:
        held.append(RunDir(run_dir.path).is_held())
        with pytest.raises(TrainingError, match="already being trained"):
            start(config, run_dir.path, progress=False)
        export(model, config, run_dir, source)

    monkeypatch.setattr(training, "_export", watched)
    finished("dit-moe", tmp_path / "run", train__steps=1)
    assert held == [True] and not RunDir(tmp_path / "run").is_held()


def test_H_what_people_put_into_a_model_directory_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = torch.nn.Linear(2, 2), tmp_path / "model"
    save_pretrained(model, path, {"a": 1})
    first = (path / "README.md").read_text()
    save_pretrained(model, path, {"a": 2}, overwrite=True)
    assert (path / "README.md").read_text() != first, "a card nobody edited is that of the model"
    (path / "README.md").write_text("Ours. Trained on birds.")
    (path / "birds.txt").write_text("wren")
    save_pretrained(model, path, {"a": 3}, overwrite=True)
    assert (path / "README.md").read_text() == "Ours. Trained on birds."
    assert (path / "birds.txt").read_text() == "wren"


def test_H_system_files_in_a_checkpoint_do_not_damage_it(tmp_path: Path) -> None:
    path = toy(tmp_path, steps=4)
    newest = checkpoint.latest(path)
    assert newest is not None
    (newest / ".DS_Store").write_bytes(b"x")
    with pytest.warns(FolderWarning, match=r"\.DS_Store: ignored"):
        assert load_weights(path, ToyModel(), "model").step == 4


def test_H_a_resumed_run_says_that_other_code_computes_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("dit-moe", tmp_path / "run", train__steps=2)
    newest = checkpoint.latest(run)
    assert newest is not None
    told = checkpoint.load(newest).scalars[resume.OPERATOR]
    assert told == resume.build.library().line()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(short("dit-moe", train__steps=2), run, progress=False)
    other = resume.build.Library(None, "off: no C compiler found")
    monkeypatch.setattr(resume.build, "library", lambda: other)
    with pytest.warns(CheckpointWarning, match=r"was compiled by .*; here it is off: no C comp"):
        resume._say_other_operator(newest, told)
