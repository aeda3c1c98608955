"""Pooled models made plain, and plain ones pooled: the same output, and what changes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import SlotConfig
from coterie.convert import extend_reuse, extended_config, untie, untied_config
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.hub import load_pretrained, save_pretrained
from coterie.recipes import rexmoe, rmoe
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.train.objectives import NextTokenConfig
from small_models import images, small, times, woken, words

DEPTH = 5


def text(slot: SlotConfig, depth: int = DEPTH) -> RunConfig:
    """A language model of ``depth`` narrow blocks with this slot."""
    config = small("rexmoe/text")
    sizes = {"width": 16, "depth": depth, "mlp_hidden": 24}
    trunk = config.model.backbone.trunk.replace(**sizes, slots=(slot,))
    model = config.model.replace(backbone=config.model.backbone.replace(trunk=trunk))
    return config.replace(model=model)


def plain(**changes: Any) -> SlotConfig:
    """Top-2 of 3, one layer's own; ``changes`` of the router."""
    slot = rexmoe.slot(3, 2, 8, reuse=1, shared=1)
    return slot.replace(expert=slot.expert.replace(router=slot.expert.router.replace(**changes)))


def answer(model: nn.Module, **options: Any) -> tuple[Tensor, Any]:
    ids = words(4).x
    with torch.no_grad():
        prediction = model(ids, torch.zeros(4), Condition(), **options)
    return prediction.value, prediction.routings


def assert_same(after: Tensor, before: Tensor) -> None:
    """Up to rounding: products with more rows add up in another order."""
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5)


ROUTERS = {
    "raw": {},
    "renorm": {"weight": "renorm"},
    "biased": {"selection_bias": True, "expert_scale": True},
    "cosine": {"score": "cosine", "weight": "renorm"},
    "two layers": {"score": {"kind": "mlp", "hidden": 5}},
    "tasks": {"score": {"kind": "task_linear", "num_tasks": 2}},
    "top_p": {"select": {"kind": "top_p", "p": 0.6}},
    "sigmoid": {"probability": "sigmoid", "edits": [{"kind": "bias_delta"}]},
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_extending_changes_no_output_at_first(name: str, training: bool) -> None:
    model = woken(text(plain(**ROUTERS[name])), std=0.3)
    changed, pooled = extend_reuse(model, 2, begin=0, end=10)
    assert changed == pooled.config and pooled.training is False
    model.train(training), pooled.train(training)
    if name == "tasks":
        for each in (model, pooled):
            with_tasks(each)
    before, old = answer(model)
    after, new = answer(pooled)
    assert_same(after, before)
    for own, wide in zip(old, new, strict=True):
        first = 3 * wide.pool_layers.index(wide.layer)
        shifted = torch.where(own.ids == 3, wide.num_experts, own.ids + first)
        assert torch.equal(wide.ids, shifted)
        foreign = torch.ones(wide.num_experts, dtype=torch.bool)
        foreign[first : first + 3] = False
        assert not wide.gates.isnan().any() and (wide.logits[:, foreign] == float("-inf")).all()


def with_tasks(model: nn.Module) -> None:
    """Tell the trunk that every second sample is of task 1."""

    def told(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z, ctx = args
        return z, ctx.replace(task=torch.arange(len(z)) % 2)

    model.backbone.trunk.register_forward_pre_hook(told)


def test_rows_of_other_layers_experts_are_their_owners() -> None:
    model = woken(text(plain(score={"kind": "linear", "bias": True})), std=0.3)
    _, pooled = extend_reuse(model, 2)
    old, new = model.backbone.trunk.expert_layers(), pooled.backbone.trunk.expert_layers()
    for first, second in ((0, 1), (2, 3)):
        for name in ("weight", "bias"):
            rows = [old[i].router(0).score.proj.get_parameter(name) for i in (first, second)]
            for i in (first, second):
                assert torch.equal(new[i].router(0).score.proj.get_parameter(name), torch.cat(rows))
    assert torch.equal(new[4].router(0).edits[0].share, torch.ones(3))  # a pool of its own
    assert new[3].router(0).edits[0].share.tolist() == [0.0] * 3 + [1.0] * 3


def test_experts_of_others_open_from_begin_to_end() -> None:
    model = woken(text(plain(), depth=2), std=0.3)
    _, pooled = extend_reuse(model, 2, begin=3, end=13)
    shares = []
    for _ in range(15):
        after, routings = answer(pooled)
        foreign = routings[1].ids < 3
        shares.append(float(foreign.float().mean()))
        if len(shares) <= 4:
            assert_same(after, answer(model)[0])
        pooled.after_step(routings)
    assert shares[:4] == [0.0] * 4 and shares[-1] > 0.2
    assert shares[4:] == sorted(shares[4:])
    edit = pooled.backbone.trunk.expert_layers()[1].router(0).edits[0]
    torch.testing.assert_close(edit.share, torch.ones(6))
    router = pooled.backbone.trunk.expert_layers()[1].router(0)
    torch.testing.assert_close(router.edits[0].share, torch.ones(6))
    routing = answer(pooled)[1][1]
    torch.testing.assert_close(routing.logits, routing.inputs @ router.score.proj.weight.T)


def test_extended_models_train_their_way_into_each_others_experts() -> None:
    """Training moves rows, pools and shares; gradients reach foreign experts once they open."""
    model = woken(text(plain(), depth=2), std=0.3)
    _, pooled = extend_reuse(model.train(), 2, begin=0, end=4)
    objective = NextTokenConfig().build(pooled)
    optimizer = torch.optim.SGD(pooled.parameters(), lr=0.1)
    second = pooled.backbone.trunk.expert_layers()[1].router(0).score.proj.weight
    gradients = []
    for step in range(4):
        losses = objective(pooled, words(8, seed=step), generator(0, "t", step), step / 4)
        optimizer.zero_grad()
        losses.total.backward()
        gradients.append(float(second.grad[:3].abs().max()))
        optimizer.step()
        pooled.after_step(losses.routings)
    assert gradients[0] == 0 and gradients[-1] > 0
    assert answer(pooled.eval())[1][1].ids.min() < 3


@pytest.mark.parametrize("reuse", [2, 3])
def test_untied_models_answer_the_same(reuse: int) -> None:
    model = woken(text(rexmoe.slot(3, 2, 8, reuse=reuse, shared=1)), std=0.3)
    changed, untied = untie(model)
    assert torch.equal(answer(untied)[0], answer(model)[0])
    assert all(slot.reuse == 1 for slot in changed.backbone.trunk.slots)
    layers = untied.backbone.trunk.expert_layers()
    assert [layer.pool.num_experts for layer in layers] == [
        3 * len(layer.pool_layers) for layer in model.backbone.trunk.expert_layers()
    ]
    assert len({p.data_ptr() for layer in layers for p in layer.pool.parameters()}) == 2 * DEPTH
    assert len(untied.backbone.trunk.pools) == 0
    routings = answer(untied)[1]
    assert all(routing.pool_layers == () for routing in routings)
    assert [aux.key for aux in untied.aux_losses(routings)] == [
        aux.key for aux in model.aux_losses(answer(model)[1])
    ]


def test_untying_drops_the_progressive_opening_and_keeps_a_recurrent_state() -> None:
    slot = rmoe.slot(3, 2, 8, size=6).replace(reuse=2)
    opening = {"kind": "progressive", "begin": 0.0, "end": 1.0}
    router = slot.expert.router.replace(edits=(opening,))
    model = woken(text(slot.replace(expert=slot.expert.replace(router=router))), std=0.3)
    changed, untied = untie(model)
    assert torch.equal(answer(untied)[0], answer(model)[0])
    assert all(slot.expert.router.edits == () for slot in changed.backbone.trunk.slots)


def test_there_and_back_is_the_model_with_closed_copies() -> None:
    model = woken(text(plain()), std=0.3)
    _, untied = untie(extend_reuse(model, 2)[1])
    assert_same(answer(untied)[0], answer(model)[0])


def test_images_too() -> None:
    base = small("rexmoe")
    slot = rexmoe.slot(3, 2, 8, reuse=1)
    trunk = base.model.backbone.trunk.replace(slots=(slot,))
    backbone = base.model.backbone.replace(trunk=trunk)
    model = woken(base.replace(model=base.model.replace(backbone=backbone)), std=0.1)
    pooled = extend_reuse(model, 2)[1]
    untied = untie(pooled)[1]
    batch, t = images(4), times(4)
    with torch.no_grad():
        before = model(batch.x, t, batch.cond).value
        for other in (pooled, untied):
            torch.testing.assert_close(other(batch.x, t, batch.cond).value, before)


def test_conversions_survive_saving(tmp_path: Path) -> None:
    model = woken(text(plain()), std=0.3)
    changed, pooled = extend_reuse(model, 2, begin=5, end=10)
    for name, (config, made) in {"p": (changed, pooled), "u": untie(pooled)}.items():
        save_pretrained(made, tmp_path / name, config.model_dump(mode="json"))
        loaded = load_pretrained(tmp_path / name)
        assert torch.equal(answer(loaded)[0], answer(made)[0])
        assert loaded.config == config
    loaded = load_pretrained(tmp_path / "p")
    assert (
        loaded.backbone.trunk.expert_layers()[0].router(0).edits[0].share[3:].tolist() == [-1] * 3
    )


def test_what_cannot_be_converted_is_named() -> None:
    model = build_model(text(plain(), depth=3)).config
    pooled = extended_config(model, 3)
    own = plain(edits=[{"kind": "candidates", "own": True}]).replace(reuse=2)
    cases = [
        (lambda: untied_config(model), "slots: 'reuse = 1'"),
        (lambda: untied_config(text(own).model), "edits: 'candidates' .*depends on the layer"),
        (lambda: extended_config(pooled, 2), r"slots\.reuse: 3 .*untie the model first"),
        (lambda: extended_config(model, 4), r"reuse: 4 .*1\.\.3"),
        (lambda: extended_config(model, 2, begin=5, end=5), r"begin: 5 .*end = 5"),
        (lambda: extended_config(text(own.replace(reuse=1)).model, 2), "edits: 'candidates'"),
        (
            lambda: extended_config(
                text(plain(select={"kind": "group_limited", "groups": 3, "top_groups": 2})).model, 2
            ),
            "select: 'group_limited' .*number of candidates",
        ),
        (lambda: extended_config(text(plain(score="fixed")).model, 2), "score: 'fixed'"),
        (lambda: extended_config(small("text:dense").model, 2), r"slots: \(\)"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
