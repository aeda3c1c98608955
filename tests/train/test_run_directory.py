from __future__ import annotations

import json

import pytest

from coterie.core.errors import ConfigError, TrainingError
from coterie.train import RunDir, TrainConfig, Trainer, read_metrics
from coterie.train.run_directory import MetricsLog, differences
from toy_training import ToyModel, ToyObjective, ToySource, toy_config

CONFIG = {"seed": 1, "train": {"lr": 0.1, "betas": (0.9, 0.99), "log_every": 5, "keep": 3}}


def test_config_is_written_once_and_guarded(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.stored_config() is None
    first = run.write_config(CONFIG)
    stamp = run.config_path.stat().st_mtime_ns
    assert run.write_config(CONFIG) == first
    with pytest.raises(ConfigError) as error:
        run.write_config({"seed": 2, "train": {**CONFIG["train"], "lr": 0.2, "new": 1}})
    for part in ("seed: 1 -> 2", "train.lr: 0.1 -> 0.2", "train.new: 'absent' -> 1", "another run"):
        assert part in str(error.value)
    assert run.config_path.stat().st_mtime_ns == stamp


def test_fields_that_do_not_change_the_result_may_differ(tmp_path):
    run = RunDir(tmp_path)
    first = run.write_config(CONFIG)
    other = {**CONFIG, "train": {**CONFIG["train"], "log_every": 50, "keep": 1}}
    assert run.write_config(other) == first
    assert set(TrainConfig.free) <= set(TrainConfig.model_fields)


def test_damaged_config_is_named(tmp_path):
    run = RunDir(tmp_path)
    for text in ("{", "[1]", "[" * 100_000):
        run.config_path.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            run.write_config(CONFIG)
    with pytest.raises(ConfigError, match="a run directory"):
        RunDir(tmp_path / "none").read_config(TrainConfig)


def test_typed_config_round_trip(tmp_path):
    config = toy_config()
    with RunDir(tmp_path).opened(config) as run:
        assert run.read_config(TrainConfig) == config


def test_differences_walks_trees():
    assert differences({"a": {"b": [1]}}, {"a": {"b": [1]}}) == []
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} -> 2"]


def test_one_trainer_at_a_time_in_one_process(tmp_path):
    with RunDir(tmp_path).lock():
        trainer = Trainer(toy_config(), ToyModel(), ToyObjective(), ToySource(), 3, tmp_path)
        with pytest.raises(TrainingError, match=r"already being trained by process \d+"):
            trainer.fit(False)
    trainer.fit(False)


def test_a_run_directory_may_be_held_by_the_caller(tmp_path):
    run, config = RunDir(tmp_path), toy_config()
    with run.lock():
        run.write_config({"seed": 3, "train": config.model_dump(mode="json"), "model": {"w": 1}})
        Trainer(config, ToyModel(), ToyObjective(), ToySource(), 3, run).fit(False)
    assert run.stored_config()["model"] == {"w": 1}
    # Another seed or training configuration than config.json says is refused.
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        Trainer(config, ToyModel(), ToyObjective(), ToySource(), 4, run).fit(False)
    slower = toy_config(lr=0.001)
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.02 -> 0\.001"):
        Trainer(slower, ToyModel(), ToyObjective(), ToySource(), 3, run).fit(False)


def test_nothing_is_created_before_training(tmp_path):
    path = tmp_path / "run"
    Trainer(toy_config(), ToyModel(), ToyObjective(), ToySource(), 3, path).project(1)
    assert not path.exists()


def test_leftovers_are_cleaned_when_the_lock_is_held(tmp_path):
    run = RunDir(tmp_path)
    for name in (".tmp-step-00000004-99", ".tmp-old-step-00000002-99"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "half").write_text("x")
    (tmp_path / ".tmp-config.json-99").write_text("{")
    with run.lock():
        assert list(run.checkpoints.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "lock"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": step / 3}) for step in range(1, 8)]
    path.write_text("\n".join(whole) + '\n{"step": 8, "lo')
    log = MetricsLog(path, 5)
    log.write({"step": 6, "loss": 0.5}, flush=True)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[2]["loss"] == 1.0
    MetricsLog(path, 0).close()
    assert read_metrics(path) == []


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = Trainer(
        toy_config(), ToyModel(), ToyObjective(), ToySource(), 3, tmp_path / "file" / "run"
    )
    with pytest.raises(TrainingError, match="could not be written"):
        trainer.fit(False)
