"""Parts of a batch, computed apart, are what one process computes with all of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from together import in_threads

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError
from coterie.core.rng import generator
from coterie.core.share import largest, normal, over_batch, own, summed, uniform, whole
from coterie.experts.balance import SelectionBiasUpdate
from coterie.recipes import get_recipe
from coterie.runs.build import build_model, build_source
from coterie.train.batch_parts import check_apart
from coterie.train.parallel import ParallelConfig
from small_models import small, with_slots, woken

BATCH = 8
PARTS = 2
CASES = (
    "dit-moe",
    "dtr:random",
    "promoe:token-choice",
    "promoe:expert-choice",
    "switch-dit",
    "deepseekmoe/text",
    "dynamic-routing",
    "rexmoe",
    "rmoe",
)
OWN_DATA = ("mofme", "fastdit-3d", "mode-policy")


def config_of(name: str) -> Any:
    return get_recipe(name).config() if name in OWN_DATA else small(name)


def losses_of(config: Any, model: Any, indices: np.ndarray) -> Losses:
    objective = config.objective.build(model)
    batch: Batch = build_source(config).get(indices)
    rng = generator(0, "train", 3, 0)
    return objective(model.train(), batch, rng, 0.2)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*CASES, *OWN_DATA])
def test_the_mean_of_parts_is_the_whole(name):
    config = config_of(name)
    models = [woken(config) for _ in range(PARTS + 1)]
    indices = np.arange(BATCH)
    expected = losses_of(config, models[-1], indices)
    expected.total.backward()

    def part(thread: Any) -> Losses:
        own_rows = np.split(indices, PARTS)[thread.rank]
        found = losses_of(config, models[thread.rank], own_rows)
        found.total.backward()
        return found

    found = in_threads(PARTS, part)
    for key in expected.main:
        mean = torch.stack([one.main[key].detach() for one in found]).mean()
        assert float(mean) == pytest.approx(float(expected.main[key].detach()), rel=2e-5), key
    assert len(expected.aux) == len(found[0].aux)
    for item, *parts in zip(expected.aux, *(one.aux for one in found)):
        mean = torch.stack([one.value.detach() for one in parts]).mean()
        torch.testing.assert_close(mean, item.value.detach(), rtol=1e-4, atol=1e-6)
    whole_gradients = gradients(models[-1])
    parts_gradients = [gradients(model) for model in models[:PARTS]]
    assert whole_gradients.keys() == parts_gradients[0].keys()
    for key, value in whole_gradients.items():
        mean = torch.stack([grads[key] for grads in parts_gradients]).mean(0)
        scale = float(value.abs().max()) + 1e-6
        assert float((mean - value).abs().max()) < 2e-4 * scale, key


def test_the_selection_bias_counts_every_part():
    config = small("dit-moe")
    slot = config.model.backbone.trunk.slots[0]
    router = slot.expert.router.replace(selection_bias=True)
    expert = slot.expert.replace(router=router, balance=(SelectionBiasUpdate(),))
    config = with_slots(config, slot.replace(expert=expert))
    models = [woken(config) for _ in range(PARTS + 1)]
    indices = np.arange(BATCH)
    models[-1].after_step(losses_of(config, models[-1], indices).routings)

    def part(thread: Any) -> None:
        own_rows = np.split(indices, PARTS)[thread.rank]
        model = models[thread.rank]
        model.after_step(losses_of(config, model, own_rows).routings)

    in_threads(PARTS, part)
    expected = {n: b for n, b in models[-1].named_buffers() if n.endswith("selection_bias")}
    assert expected and any(value.abs().max() > 0 for value in expected.values())
    for model in models[:PARTS]:
        for key, value in expected.items():
            assert torch.equal(model.get_buffer(key), value)


def test_rows_are_drawn_for_the_whole_and_cut():
    expected = normal((6, 3), generator(1)), uniform((6,), generator(1))

    def part(thread: Any) -> tuple[torch.Tensor, ...]:
        assert whole(3) == 6
        assert own(torch.arange(6)).tolist() == list(range(3 * thread.rank, 3 * thread.rank + 3))
        assert largest(4 + thread.rank) == 5
        return normal((3, 3), generator(1)), uniform((3,), generator(1))

    found = in_threads(2, part)
    for whole_rows, *parts in zip(expected, *found):
        assert torch.equal(torch.cat(parts), whole_rows)


def test_sums_and_means_with_uneven_counts():
    values = torch.tensor([[1.0, 2.0], [5.0, 0.0]])
    counts = torch.tensor([[3.0, 0.0], [1.0, 0.0]])

    def part(thread: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = values[thread.rank].clone().requires_grad_()
        (total,) = summed(mine)
        total.square().sum().backward()
        return total.detach(), mine.grad / 2, over_batch(values[thread.rank], counts[thread.rank])

    found = in_threads(2, part)
    for total, grad, _ in found:
        assert total.tolist() == [6.0, 2.0]
        assert grad.tolist() == [12.0, 4.0]  # of the mean over parts of the square of the sum
    mean = torch.stack([one[2] for one in found]).mean(0)
    assert mean.tolist() == [6.0 / 4.0, 2.0]


def test_alone_nothing_changes():
    value = torch.randn(3, requires_grad=True)
    assert summed(value)[0] is value
    assert own(value) is value and whole(7) == 7 and largest(3) == 3
    assert torch.equal(normal((4,), generator(2)), torch.randn(4, generator=generator(2)))


def test_a_norm_over_the_batch_is_refused_by_name():
    model = build_model(get_recipe("home").config())
    with pytest.raises(ConfigError, match=r"parallel: backbone\..* normalises over its batch"):
        check_apart(model, "parallel", "no process")
    check_apart(build_model(small("dit-moe")), "parallel", "no process")


def test_what_experts_remember_of_a_batch_is_refused_by_name(monkeypatch):
    def statistics(self: Any, width: int) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros(3)}

    config = small("dit-moe")
    slot = config.model.backbone.trunk.slots[0]
    monkeypatch.setattr(type(slot.expert.kind), "statistics", statistics)
    with pytest.raises(ConfigError, match=r"^parallel: backbone\..*\.seen is moved by the rows"):
        check_apart(build_model(config), "parallel", "no process")


@pytest.mark.parametrize("text", ["data", "data=0", "rows=2", "data=2,data=2", "data=-1", ""])
def test_degrees_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigError, match=r"parallel: .*data=2,shard=2,expert=2"):
        ParallelConfig.parse(text)


def test_a_grid_of_processes_has_every_group_once():
    config = ParallelConfig.parse("expert=2, data=3,shard=2")
    assert config.processes == 12
    assert config.groups("expert")[:2] == [[0, 1], [2, 3]]
    assert config.groups("shard")[:2] == [[0, 2], [1, 3]]
    assert config.groups("data")[0] == [0, 4, 8]
    for axes in (("data",), ("shard",), ("expert",), ("data", "expert"), ("data", "shard")):
        assert sorted(rank for group in config.groups(*axes) for rank in group) == list(range(12))
    assert copy.copy(config).groups("data", "shard", "expert") == [list(range(12))]
