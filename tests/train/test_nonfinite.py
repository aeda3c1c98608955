from __future__ import annotations

import copy
import math

import pytest
import torch
from toy_training import (
    POISON_STEPS,
    ToyObjective,
    ToySource,
    assert_equal,
    train,
    weights,
)

from coterie.core.errors import DataError, TrainingError
from coterie.train import read_metrics


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
