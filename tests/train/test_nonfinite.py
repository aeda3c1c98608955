from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from coterie.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from coterie.train import checkpoint, read_metrics
from coterie.train.run_directory import RunDir
from toy_training import (
    POISON_STEPS,
    ToyObjective,
    ToySource,
    assert_equal,
    train,
    weights,
)


@pytest.mark.parametrize("kind", ["loss", "grad"])
def test_one_bad_step_is_skipped_and_explained(kind, tmp_path):
    snapshots = {}

    def snapshot(trainer, record):
        snapshots[record["step"]] = weights(trainer.model), copy.deepcopy(trainer.ema.tensors(0.9))

    poison = {5: kind}  # 0-based: the record of step 6
    trainer, records = train(tmp_path, ToyObjective(poison), callbacks=(snapshot,))
    assert [r["step"] for r in records if "skipped" in r] == [6]
    problem = records[5]["skipped"]
    assert len(problem["ids"]) == 8
    if kind == "loss":
        assert records[5]["loss"] is None
        assert problem["reason"] == "loss is nan"
    else:
        assert math.isfinite(records[5]["loss"])
        assert problem["gradient"] == "model.second.bias"
    for before, after in zip(snapshots[5], snapshots[6], strict=True):
        assert_equal(before, after)
    assert trainer.state.skipped == 1
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values())
    assert "skipped" in read_metrics(tmp_path / "metrics.jsonl")[5]


def test_the_first_module_to_blow_up_is_named():
    def explode(trainer, record):
        if record["step"] == 2:
            trainer.model.second.weight.data[0, 0] = math.inf

    with pytest.raises(TrainingError, match="first in second; weights are as before") as error:
        train(callbacks=(explode,))
    assert "3 steps in a row" in str(error.value)


def test_stops_after_the_limit_but_not_for_scattered_bad_steps(tmp_path):
    trainer, _ = train(objective=ToyObjective({1: "loss", 3: "grad", 5: "loss", 6: "loss"}))
    assert trainer.state.step == POISON_STEPS
    assert trainer.state.skipped == 4
    with pytest.raises(TrainingError, match="step 8: loss is nan in 3 steps in a row"):
        train(tmp_path, ToyObjective({5: "loss", 6: "loss", 7: "loss"}))
    # What had been learnt is saved, and going on passes the bad steps.
    resumed, records = train(tmp_path)
    assert records[0]["step"] == 9
    assert resumed.state.skipped == 3


def test_non_finite_data_is_refused_with_its_samples():
    source = ToySource(bad=(7, 30))
    with pytest.raises(
        DataError, match=r"plane: x is not finite in samples \[(7|30|7, 30|30, 7)\]"
    ):
        train(source=source)


def blown_up(run_dir, **changes):
    """Sound checkpoints at 4 and 8, then steps that are not finite until training stops."""
    poison = ToyObjective(dict.fromkeys(range(8, 20), "loss"))
    with pytest.raises(TrainingError, match=r"lower train\.lr, or set train\.clip"):
        train(run_dir, poison, **{"keep": 2, "checkpoint_every": 4, **changes})


def saved(run_dir):
    return [step for step, _ in checkpoint.steps(run_dir)]


def test_G8_bad_steps_do_not_rotate_out_good_checkpoints(tmp_path):
    for stopped in (11, 14):  # started again, it stops again
        blown_up(tmp_path)
        assert saved(tmp_path) == [4, 8, stopped]
    trainer, _ = train(tmp_path, keep=2)
    assert trainer.state.step == POISON_STEPS and saved(tmp_path) == [16, 20]


def test_G8_a_restart_counts_bad_steps_anew(tmp_path):
    blown_up(tmp_path)
    poison = ToyObjective({11: "loss", 12: "grad"})  # fewer than the limit, right at the restart
    trainer, records = train(tmp_path, poison, keep=2)
    assert records[0]["step"] == 12 and trainer.state.step == POISON_STEPS
    assert trainer.state.skipped == 5 and trainer.state.skipped_in_a_row == 0


def test_G8_what_the_message_advises_is_allowed_and_goes_on_from_before(tmp_path):
    blown_up(tmp_path)
    for changes in ({"lr": 0.001, "betas": [0.5, 0.9]}, {"weight_decay": 0.5}):
        with pytest.raises(ConfigError, match="another configuration"):
            train(tmp_path, keep=2, **changes)
    trainer, records = train(tmp_path, keep=2, lr=0.001, clip=0.5)
    assert records[0]["step"] == 9 and trainer.state.skipped == 0
    assert 0 < records[0]["lr"] <= 0.001
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in logged] == list(range(1, POISON_STEPS + 1))
    assert RunDir(tmp_path).stored_config()["train"]["lr"] == 0.001
    old = json.loads((tmp_path / "config-until-8.json").read_text())
    assert old["train"]["lr"] == 0.02
    with pytest.raises(ConfigError, match=r"train\.lr"):
        train(tmp_path, keep=2, lr=0.002)  # it did not blow up any more


@pytest.mark.parametrize("killed", ["drop_later", "save"])
def test_G8_killed_while_it_takes_advice_the_same_call_ends_it(tmp_path, monkeypatch, killed):
    blown_up(tmp_path)
    real = getattr(checkpoint, killed)

    def die(*given, **named):
        real(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, killed, die)
        train(tmp_path, keep=2, lr=0.001)
    _, records = train(tmp_path, keep=2, lr=0.001)
    assert records[0]["step"] == 9


def test_G8_weights_are_checked_after_the_step_and_never_saved(tmp_path):
    def explode(trainer, record):
        if record["step"] == 5:  # as a step would whose learning rate is too large for float32
            for group in trainer.optimizer.param_groups:
                group["weight_decay"] = math.inf

    said = r"^step 6: model\.first\.weight is not finite after it; .* lower train\.lr$"
    with pytest.raises(TrainingError, match=said):
        train(tmp_path, callbacks=(explode,), keep=9)
    assert saved(tmp_path) == [4]
    with pytest.raises(ConfigError, match=r"lr: 1e\+38 is not allowed"):
        train(lr=1e38)
    bad = {"model": {"weight": torch.tensor([1.0, math.nan])}}
    with pytest.raises(CheckpointError, match=r"^model: weight is not finite; no checkpoint"):
        checkpoint.save(tmp_path, bad, {}, step=5)
    assert saved(tmp_path) == [4]
