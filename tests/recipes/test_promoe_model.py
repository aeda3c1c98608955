"""ProMoE as a whole model: the hard split by the label that is left after dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coterie.core.batch import Losses
from coterie.core.context import NULL_LABEL
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.solvers import GuidanceConfig, guide
from small_models import images, small, times, woken

VARIANTS = ("promoe", "promoe:expert-choice")
LABELS = [i % 10 for i in range(16)]


def trained(name: str, dropout: float) -> tuple[nn.Module, Losses]:
    """One backward pass with labels dropped with probability ``dropout``."""
    model = woken(small(name)).train()
    objective = small(name).objective.replace(label_dropout=dropout).build(model)
    losses = objective(model, images(16, labels=LABELS), generator(0, "t"), 0.5)
    losses.total.backward()
    return model, losses


def expert_layer(model: nn.Module) -> nn.Module:
    return model.backbone.trunk.blocks[1].ffn


@pytest.mark.parametrize("name", VARIANTS)
def test_only_unconditional_samples(name: str) -> None:
    model, losses = trained(name, dropout=1.0)
    layer = expert_layer(model)
    for stack in layer.pool.parameters():
        assert not stack.grad[:-1].any() and stack.grad[-1].any()
    assert not layer.routers[0].score.prototypes.grad.any()
    (aux,) = losses.aux
    assert aux.value.item() == 0.0
    (routing,) = losses.routings
    assert routing.counts().sum() == 0  # rows the router scored: none
    assert (routing.ids[:, 0] == 6).all() and (routing.gates[:, 0] == 1).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_only_conditional_samples(name: str) -> None:
    model, losses = trained(name, dropout=0.0)
    layer = expert_layer(model)
    for stack in layer.pool.parameters():
        assert not stack.grad[-1].any() and stack.grad[:-1].any()
    assert layer.routers[0].score.prototypes.grad.any()
    (aux,) = losses.aux
    assert (aux.key, aux.weight) == ("contrastive/layer1", 1.0) and aux.value.item() > 0
    (routing,) = losses.routings
    expected = 16 * 16 if name == "promoe" else 16 * 6 * (16 // 6)
    assert routing.counts().sum() == expected and routing.counts()[6] == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_the_router_sees_the_label_that_is_left_after_dropout(name: str) -> None:
    _, losses = trained(name, dropout=0.5)
    (routing,) = losses.routings
    label = routing.label
    dropped = label == NULL_LABEL
    assert 2 < dropped.sum() < 14
    assert torch.equal(label[~dropped], torch.tensor(LABELS)[~dropped])
    ids = routing.ids.view(16, 16, -1)
    assert (ids[dropped][..., 0] == 6).all()
    assert (ids[~dropped] != 6).all()
    assert torch.equal(routing.mask.view(16, 16).all(1), ~dropped)


def test_gates_are_raw_cosines_and_may_be_negative() -> None:
    (routing,) = trained("promoe", dropout=0.0)[1].routings
    lengths = routing.inputs.norm(dim=1)[:, None] * routing.prototypes.norm(dim=1)
    cosine = routing.inputs @ routing.prototypes.T / lengths
    torch.testing.assert_close(routing.gates[:, 0], cosine.amax(1), rtol=1e-4, atol=1e-5)
    assert (routing.logits[:, :6] < 0).any()


def test_the_scale_of_prototypes_changes_nothing() -> None:
    model = woken(small("promoe"))
    batch, t = images(8), times(8)
    before = model(batch.x, t, batch.cond)
    with torch.no_grad():
        prototypes = expert_layer(model).routers[0].score.prototypes
        prototypes.mul_(torch.tensor([0.1, 2.0, 30.0, 1.0, 7.0, 0.5])[:, None])
    after = model(batch.x, t, batch.cond)
    assert torch.equal(before.routings[0].ids, after.routings[0].ids)
    torch.testing.assert_close(after.value, before.value, rtol=1e-4, atol=1e-5)


def test_the_null_half_of_guidance_touches_no_routed_expert() -> None:
    model = woken(small("promoe"))
    guided = guide(model, GuidanceConfig(weight=2.0))
    cond = Condition(label=torch.tensor([3, 4, 5]))
    x, t = images(3).x, times(3)
    (routing,) = guided(x, t, cond).routings
    assert routing.label.tolist() == [3, 4, 5, -1, -1, -1]
    ids = routing.ids.view(6, 16)
    assert (ids[3:] == 6).all() and (ids[:3] < 6).all()
    with torch.no_grad():
        before = model(x, t, cond.as_null(3)).value
        for stack in expert_layer(model).pool.parameters():
            stack[:-1] = float("nan")
        assert torch.equal(model(x, t, cond.as_null(3)).value, before)
