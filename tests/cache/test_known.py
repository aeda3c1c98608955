"""What a network makes of noise level and label is a table, and the answers stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from coterie.cache import applicable, cached, cost, measure
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, guide, sample
from small_models import images, small, woken

TIMES = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)
MODELS = ["dit", "dit-moe", "switch-dit"]


class Calls:
    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, given: Any, out: Any) -> None:
        self.rows.append(len(out))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_answers_at_every_step_and_label(name: str) -> None:
    made = woken(small(name), std=0.1)
    assert "modulation" in applicable(made)
    kept = cached(made, TIMES, caches=("modulation",))
    batch = images(4)
    for t in [*TIMES.float(), TIMES.float()[[3, 0, 3, 1]]]:
        expected = made(batch.x, t.expand(4), batch.cond)
        for _ in range(2):  # made, then known
            answer = kept(batch.x, t.expand(4), batch.cond)
            torch.testing.assert_close(answer.value, expected.value, atol=1e-5, rtol=1e-5)
        for one, other in zip(answer.routings, expected.routings, strict=True):
            assert torch.equal(one.ids, other.ids)
    double = cached(made.double(), TIMES)
    expected = made(batch.x.double(), TIMES, batch.cond)
    answer = double(batch.x.double(), TIMES, batch.cond)
    torch.testing.assert_close(answer.value, expected.value, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_each_label_is_worked_out_once_for_all_steps_samples_and_batches() -> None:
    made = woken(small("dit"))
    grid, steps = GRIDS.parse("uniform"), 3
    kept = cached(made, grid.build(made.process, steps))
    time, block = Calls(kept.backbone.time), Calls(kept.backbone.trunk.blocks[0].modulation)
    for batch in range(3):
        sample(
            guide(kept, GuidanceConfig(weight=2.0)),
            SampleNoise([batch, 9]).normal((1, 8, 8)),
            Condition(label=torch.tensor([1, 4])),
            solver=SOLVERS.parse("euler"),
            grid=grid,
            steps=steps,
        )
    assert time.rows == block.rows == [steps] * 3  # labels 1, 4 and none


@torch.no_grad()
def test_a_table_does_not_depend_on_what_else_was_asked() -> None:
    made = woken(small("dit"))
    one, two = (cached(made, TIMES) for _ in range(2))
    batch, t = images(4), TIMES[1:2].float().expand(4)
    alone = one(batch.x[:1], t[:1], batch.cond.index(torch.tensor([0])))
    two(batch.x.flip(0), t, batch.cond.index(torch.tensor([3, 2, 1, 0])))
    assert one.tables is not None and two.tables is not None
    assert torch.equal(one.tables.tables[0], two.tables.tables[0])
    again = two(batch.x[:1], t[:1], batch.cond.index(torch.tensor([0])))
    assert torch.equal(alone.value, again.value)


@torch.no_grad()
def test_too_many_labels_are_answered_without_tables() -> None:
    made = woken(small("dit"))
    kept = cached(made, TIMES)
    assert kept.tables is not None
    kept.tables.most_bytes = 1
    batch, t = images(3), TIMES[:1].float().expand(3)
    for _ in range(3):
        answer = kept(batch.x, t, batch.cond)
        torch.testing.assert_close(answer.value, made(batch.x, t, batch.cond).value)
    assert len(kept.tables.tables) <= 3
    one = Condition(label=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(kept(batch.x, t, one).value, made(batch.x, t, one).value)


@torch.no_grad()
def test_what_it_saves_is_counted() -> None:
    made = woken(small("dit"))
    kept = cached(made, TIMES)
    found = cost(kept)
    assert 0 < found.flops_with < found.flops_without
    assert found.parameters_with > found.parameters_without
    assert set(measure(kept, rounds=1)) == {"without_ms", "with_ms", "ratio"}


def test_bad_input() -> None:
    made = woken(small("dit"))
    kept = cached(made, TIMES)
    batch, t = images(2), TIMES[:2].float()
    with pytest.raises(DataError, match="label: 12 is not allowed"):
        kept(batch.x, t, Condition(label=torch.tensor([12, 0])))
    with pytest.raises(ConfigError, match="fold again with the times"):
        kept(batch.x, t + 0.01, batch.cond)
    with pytest.raises(ConfigError, match="caches: 'tables' is not allowed; allowed: routing"):
        cached(made, TIMES, caches=("tables",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model with experts"):
        cached(made, TIMES, caches=("routing",))
    with torch.no_grad():
        made.backbone.head.bias.add_(1.0)
    with pytest.raises(ConfigError, match="weights have changed since"):
        kept(batch.x, t, batch.cond)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_serves_with_gradients_and_without(name: str) -> None:
    """A guide may ask for the gradient of an answer after plain calls, and the other way round."""
    made = woken(small(name), std=0.1)
    kept, batch = cached(made, TIMES), images(2)
    t = TIMES[1:2].float().expand(2)

    def gradient(model: nn.Module) -> torch.Tensor:
        leaf = batch.x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf, t, batch.cond).value.square().sum(), leaf)[0]

    for _ in range(2):
        with torch.no_grad():
            plain = kept(batch.x, t, batch.cond).value
            torch.testing.assert_close(
                plain, made(batch.x, t, batch.cond).value, rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(gradient(kept), gradient(made), rtol=1e-4, atol=1e-5)
    again = plain.requires_grad_()  # an answer goes on to meet gradients
    (grad,) = torch.autograd.grad(again.square().sum(), again)
    torch.testing.assert_close(grad, 2 * again.detach())
