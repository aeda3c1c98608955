"""What training is timed beside, and memory counted from shapes against memory that was used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coterie.bench.live_memory import LiveBytes
from coterie.bench.timing import Place
from coterie.bench.train import TimedSource, trainer_of, training_goals, with_their_experts
from coterie.core.config import override
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.experts.dispatch import native as operator
from coterie.experts.shared import SharedConfig
from coterie.recipes.dit_moe import arms
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.memory import expert_rows, training_memory

SMALL = {"model.backbone.trunk.depth": 2, "train.batch": 32, "train.threads": 1}


def config(arm: str) -> RunConfig:
    return override(arms()[arm], {**SMALL, "data": {"kind": "digits"}, **SHAPE})


SHAPE: dict[str, Any] = {"model.backbone.image_size": 8, "model.backbone.patch": 2}


@pytest.mark.parametrize("arm", ["moe", "no-balance", "dense"])
def test_memory_counted_from_shapes_is_what_a_step_uses(arm: str) -> None:
    made = config(arm)
    trainer = trainer_of(made, Place())
    trainer.train_step()
    with LiveBytes() as live:
        trainer.train_step()
    counted = training_memory(made, count_parameters(trainer.model).total)
    begin = counted.trunk + counted.experts
    assert live.peak == pytest.approx(max(begin, counted.gradients + counted.updates), rel=0.15)
    weights = sum(p.numel() * p.itemsize for p in trainer.model.parameters())
    moments = sum(
        value.numel() * value.itemsize
        for state in trainer.optimizer.state.values()
        for value in state.values()
    )
    assert counted.weights == weights and counted.optimizer == pytest.approx(moments, rel=0.01)
    assert counted.peak == counted.persistent + max(begin, counted.gradients + counted.updates)


def test_memory_is_counted_for_the_device_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the native operator does not serve dense networks, torch keeps more of them."""
    monkeypatch.setattr(operator, "_may", lambda: False)
    trainer = trainer_of(config("dense"), Place())
    trainer.train_step()
    with LiveBytes() as live:
        trainer.train_step()
    gpu = override(config("dense"), {"train.device": "cuda:1"})  # which need not be here
    counted = training_memory(gpu, count_parameters(trainer.model).total)
    assert live.peak == pytest.approx(counted.trunk, rel=0.1)
    here = override(gpu, {"train.device": "cpu"})
    monkeypatch.setattr("coterie.runs.memory.library", lambda: SimpleNamespace(ready=True))
    assert training_memory(here, 1).trunk < 0.9 * counted.trunk
    monkeypatch.setattr("coterie.runs.memory.library", lambda: SimpleNamespace(ready=False))
    assert training_memory(here, 1).trunk == counted.trunk


def test_shared_experts_leave_more_where_torch_serves_them() -> None:
    plain = config("moe").model.backbone.trunk.slots[0].expert.replace(shared=None)
    shared = plain.replace(shared=SharedConfig(hidden=24, count=2))
    for native, halves in ((True, 2), (False, 4)):  # and, of torch's: silu(gate), the product
        more = expert_rows(shared, 64, native) - expert_rows(plain, 64, native)
        assert more == halves * 48


def test_memory_grows_by_chosen_rows_and_not_by_experts() -> None:
    slot = config("moe").model.backbone.trunk.slots[0].expert
    width, hidden = 64, slot.kind.size(64)
    rows = expert_rows(slot, width)
    more = expert_rows(slot.replace(num_experts=4 * slot.num_experts), width)
    assert more - rows == 2 * 3 * slot.num_experts  # logits and probabilities
    twice = slot.replace(router=slot.router.replace(select={"kind": "top_k", "k": 4}))
    assert expert_rows(twice, width) - rows == 2 * (width + 2 * hidden)


def test_other_models_are_not_counted() -> None:
    from coterie.recipes.mode_policy import tiny

    with pytest.raises(ConfigError, match=r"model\.backbone\.kind"):
        training_memory(tiny(), 1)


def test_goals_of_training_are_judged_by_what_was_measured() -> None:
    times = {"dit-moe": [1.0], "transformers-eager": [3.0], "transformers-grouped_mm": [0.8]}
    rows = [{"candidate": "dense", "data_share": 0.2}]
    memory = [{"candidate": "dense", "counted_over_measured": 0.8}]
    made = training_goals(times, rows, memory)
    assert [(row["figure"], row["met"]) for row in made] == [
        (1.25, False),
        (0.2, False),
        (0.8, False),
        (0.8, True),
    ]
    assert made[0]["peer"] == "transformers-grouped_mm"


def test_a_timed_source_gives_what_the_source_gives() -> None:
    place = Place()
    source = trainer_of(config("moe"), place)._gradients.source
    assert isinstance(source, TimedSource) and source.seconds == 0.0
    batch = source.get([0, 1])
    assert torch.equal(batch.x, source._source.get([0, 1]).x) and source.seconds > 0.0
    assert source.num_classes == source._source.num_classes


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_transformers_experts_train_as_ours_do(implementation: str) -> None:
    pytest.importorskip("transformers")
    ours, theirs = trainer_of(config("moe"), Place()), None
    theirs = trainer_of(config("moe"), Place(), implementation)
    for _ in range(2):
        one, other = ours.train_step()["loss"], theirs.train_step()["loss"]
        assert other == pytest.approx(one, rel=1e-4)
    counts = [count_parameters(trainer.model).total for trainer in (ours, theirs)]
    assert counts[0] == counts[1]
    model = with_their_experts(build_model(config("moe")), implementation)
    names = [name for name, p in model.named_parameters() if p.numel() == 0]
    assert names and all("pool" in name for name in names)  # their weights are no second copy
