"""Runs that start from the weights of others: as they are, or made into experts."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.convert import UpcycleConfig, check_preserved
from coterie.core.config import override
from coterie.core.errors import CheckpointError, ConfigError, TrainingError
from coterie.core.folder import MANIFEST, file_digest
from coterie.experts import Router
from coterie.runs.build import build_model, upcycled_run
from coterie.runs.config import RunConfig
from coterie.runs.measure.evaluation import held_out
from coterie.runs.origins.first_weights import InitConfig
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import make_trainer, prepare, start
from coterie.train import RunDir, Trainer, checkpoint, load_weights, read_metrics
from small_models import small, words
from small_runs import finished, short

FORK = multiprocessing.get_context("fork")
UPCYCLE = UpcycleConfig(copies=3, slices=2, calibration=16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("dit", tmp_path_factory.mktemp("runs") / "dense", train__lr=0.01)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("text:dense", tmp_path_factory.mktemp("runs") / "text")


def upcycled(dense: Path, **changes: Any) -> RunConfig:
    config = upcycled_run(RunConfig.load(dense / "config.json"), dense, UPCYCLE)
    return override(config, {key.replace("__", "."): value for key, value in changes.items()})


def same(first: Path, second: Path) -> None:
    """Every tensor of the last checkpoints, and every record but the clock."""
    a, b = (checkpoint.load(checkpoint.latest(path)) for path in (first, second))
    assert a.step == b.step and a.state.keys() == b.state.keys()
    for group, tensors in a.state.items():
        assert tensors.keys() == b.state[group].keys()
        for name, value in tensors.items():
            assert torch.equal(value, b.state[group][name]), (group, name)
    logs = [read_metrics(path / "metrics.jsonl") for path in (first, second)]
    for records in logs:
        for record in records:
            record.pop("machine", None)
    assert logs[0] == logs[1]


# As they are


def test_a_run_may_start_from_another_ones_weights(dense: Path, tmp_path: Path) -> None:
    config = RunConfig.load(dense / "config.json").replace(init=InitConfig(path=str(dense)))
    path = prepare(config, tmp_path / "next")
    source, own = (load_run(run).model.state_dict() for run in (dense, path))
    assert all(torch.equal(own[name], source[name]) for name in source)
    first = checkpoint.load(checkpoint.latest(path))
    assert first.step == 0
    for name, value in first.state["ema"].items():
        assert torch.equal(value, first.state["model"][name].float()), "averages start there too"
    origin = json.loads((path / "config.json").read_text(encoding="utf-8"))["init"]["origin"]
    newest = checkpoint.latest(dense)
    assert origin["step"] == 4 and origin["digest"] == file_digest(newest / MANIFEST)


def test_the_plain_weights_or_a_model_directory_will_do(dense: Path, tmp_path: Path) -> None:
    config = RunConfig.load(dense / "config.json")
    plain = build_model(config)
    load_weights(dense, plain, "model")
    chosen = config.replace(init=InitConfig(path=str(dense), weights="model"))
    trainer = make_trainer(chosen)
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    shutil.copytree(dense / "model", tmp_path / "model")
    path = prepare(
        config.replace(init=InitConfig(path=str(tmp_path / "model"))), tmp_path / "from-model"
    )
    first, second = (load_run(run).model.state_dict() for run in (dense, path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    stored = RunConfig.load(path / "config.json")
    assert stored.init is not None and stored.init.origin is not None
    assert stored.init.origin.step is None
    assert stored.init.origin.digest == file_digest(tmp_path / "model" / MANIFEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__backbone__trunk__depth": 1}, r"init\.path: .*unknown tensors .*blocks\.1"),
        ({"model__backbone__trunk__depth": 3}, r"init\.path: .*missing tensors .*blocks\.2"),
        (
            {"model__backbone__trunk__mlp_hidden": 64},
            r"init\.path: .*blocks\.0\.ffn\.up\.weight is .*\[256, 64\], expected .*\[64, 64\]",
        ),
    ],
)
def test_weights_of_another_shape_are_named(
    dense: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = short("dit", **changes).replace(init=InitConfig(path=str(dense)))
    with pytest.raises(CheckpointError, match=message):
        start(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def test_what_is_neither_a_run_nor_a_model_is_named(dense: Path, tmp_path: Path) -> None:
    config = short("dit")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for content, message in (
        (None, r"init\.path: .*nothing'.*a run directory or a model directory"),
        ('{"model_type": "llama"}', r"init\.path: .*foreign'.*describes no such model"),
        ("{", r"config\.json: not valid JSON"),
    ):
        path = tmp_path / "nothing" if content is None else foreign
        if content is not None:
            (foreign / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            prepare(config.replace(init=InitConfig(path=str(path))), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        PretrainedConfig(path=str(foreign)).absent  # noqa: B018 - reading it is the test
    (foreign / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: not a JSON object"):
        prepare(config.replace(init=InitConfig(path=str(foreign))), tmp_path / "run")
    shutil.copytree(dense, tmp_path / "untrained")
    shutil.rmtree(tmp_path / "untrained" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        prepare(config.replace(init=InitConfig(path=str(tmp_path / "untrained"))), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"weights: 'average' .*ema, model"):
        prepare(config.replace(init=InitConfig(path=str(dense), weights="average")), tmp_path / "r")


# Made into experts


@pytest.mark.parametrize("kind", ["dense", "text"])
def test_an_upcycled_run_is_the_dense_one_at_step_0(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    run = prepare(upcycled(source), tmp_path / "experts")
    before, after = load_run(source), load_run(run)
    batch = words(4) if after.is_text else after.source.get(torch.arange(8).numpy())
    found = check_preserved(before.model, after.model, batch, UPCYCLE)
    assert found.holds and found.whole_copies == 1.0
    assert any(isinstance(module, Router) for module in after.model.modules())
    assert after.step == 0
    assert held_out(after, 32).loss == pytest.approx(held_out(before, 32).loss, rel=1e-5)
    assert read_metrics(run / "metrics.jsonl") == []


def killed_at(run: Path, step: int) -> None:
    """Go on with a run in this process until it kills itself after a step."""

    def act(trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    config = RunConfig.load(run / "config.json")
    make_trainer(config, RunDir(run)).fit(False, (act,))


def test_killed_without_its_source_it_goes_on_to_the_bit(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    config = upcycled(source)
    whole = start(config, tmp_path / "whole", progress=False)
    parts = prepare(config, tmp_path / "parts")
    shutil.rmtree(source)
    for step in (1, 3):  # before the first checkpoint of training, and after it
        process = FORK.Process(target=killed_at, args=(parts, step))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    start(config, parts, progress=False)
    same(parts, whole)


def test_router_rows_of_a_copy_and_copies_diverge(dense: Path, tmp_path: Path) -> None:
    run = load_run(start(upcycled(dense, train__lr=0.01), tmp_path / "run", progress=False))
    for layer in run.model.backbone.trunk.expert_layers():
        rows = layer.router(0).score.proj.weight.unflatten(0, (3, 2))
        assert ((rows[:, 0] - rows[:, 1]).abs().amax(dim=1) > 0).all()
        up = layer.pool.stacks()["up"].unflatten(0, (3, 2))
        assert not torch.equal(up[0], up[1])


def test_a_source_that_has_moved_on_is_refused_until_the_run_has_begun(
    dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    path = prepare(upcycled(source), tmp_path / "run")
    config = RunConfig.load(path / "config.json")
    other = finished("dit", tmp_path / "other", seed=5)
    shutil.rmtree(source)
    shutil.copytree(other, source)
    start(config, path, progress=False)
    with pytest.raises(CheckpointError, match=r"holds other weights than .*\(step 4\)"):
        start(config, tmp_path / "again", progress=False)


def test_experts_of_the_model_must_be_those_that_upcycling_makes(dense: Path) -> None:
    config = short("dit")
    for name, wanted in (("dit", UPCYCLE), ("dit-moe", UPCYCLE), ("dit", UpcycleConfig(slices=3))):
        with pytest.raises(ConfigError, match=r"init\.upcycle: 'slice\+copy' .*coterie upcycle"):
            short(name).replace(init=InitConfig(path=str(dense), upcycle=wanted))
    made = upcycled_run(config, dense, UPCYCLE)
    place = "model.backbone.trunk.slots.0.expert"
    assert override(made, {f"{place}.balance.0.weight": 0.5}).init == made.init
    with pytest.raises(ConfigError, match=r"init\.upcycle"):
        override(made, {f"{place}.router.scale": 1.0})


def test_flags_reach_where_nothing_was(dense: Path) -> None:
    config = override(small("dit"), {"init.path": str(dense), "init.weights": "model"})
    assert config.init == InitConfig(path=str(dense), weights="model")
    with pytest.raises(ConfigError, match=r"init\.pth: .*did you mean 'path'"):
        override(small("dit"), {"init.path": "x", "init.pth": "x"})
    with pytest.raises(ConfigError, match=r"init\.path: missing"):
        override(small("dit"), {"init.weights": "model"})
    assert RunConfig.from_json(config.to_json()) == config


def test_a_locked_run_is_not_prepared_again(dense: Path, tmp_path: Path) -> None:
    with RunDir(tmp_path).lock(), pytest.raises(TrainingError, match="already being trained"):
        prepare(upcycled(dense), tmp_path)
