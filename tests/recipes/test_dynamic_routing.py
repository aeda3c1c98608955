"""Dynamic routing: the threshold at its ends, what the two losses do, what a row costs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, layer_cost, multiply_adds
from coterie.recipes import dynamic_routing
from coterie.recipes.dynamic_routing import slot
from coterie.runs.config import RunConfig
from small_models import images, small, with_slots, woken, words

WIDTH, ROWS, EXPERTS = 12, (3, 20), 6


def built(sharpness: float = 3.0, **options: Any) -> ExpertLayer:
    """A layer whose router is decided to a different degree from row to row."""
    layer = slot(**{"num_experts": EXPERTS, "hidden": 8, **options}).expert.build(WIDTH)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.routers[0].score.proj.weight.mul_(sharpness)
    return layer


def inputs(seed: int = 0) -> tuple[Tensor, Context]:
    rng = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3.0, ROWS[1])[:, None]
    return torch.randn(*ROWS, WIDTH, generator=rng) * scale, Context(*ROWS)


def taken(layer: ExpertLayer, h: Tensor, ctx: Context) -> Tensor:
    """i64 [R]: how many experts each row uses."""
    (routing,) = layer(h, ctx).routings
    return routing.valid.sum(1)


def test_a_threshold_near_zero_is_raw_top_1() -> None:
    top_p, top_1 = built(p=1e-9), built(k=1)
    h, ctx = inputs()
    assert torch.equal(top_p(h, ctx).y, top_1(h, ctx).y)
    assert (taken(top_p, h, ctx) == 1).all()


def test_a_threshold_of_one_is_the_dense_mixture() -> None:
    layer = built(p=1.0)
    h, ctx = inputs()
    probs = (h @ layer.routers[0].score.proj.weight.T).softmax(-1)
    modules = layer.pool.unpack()
    mixture = sum(probs[..., e, None] * modules[e](h) for e in range(EXPERTS))
    torch.testing.assert_close(layer(h, ctx).y, mixture, rtol=1e-4, atol=1e-5)


def test_output_equals_a_loop_with_raw_probabilities() -> None:
    layer = built(p=0.6)
    h, ctx = inputs()
    modules = layer.pool.unpack()
    rows = h.flatten(0, 1)
    probs = (rows @ layer.routers[0].score.proj.weight.T).softmax(-1)
    want = torch.zeros_like(rows)
    for r, row in enumerate(probs.tolist()):
        total = 0.0
        for e in sorted(range(EXPERTS), key=lambda e: -row[e]):
            want[r] += row[e] * modules[e](rows[r])
            total += row[e]
            if total > 0.6:  # the expert that crosses the threshold is in
                break
    torch.testing.assert_close(layer(h, ctx).y.flatten(0, 1), want, rtol=1e-4, atol=1e-5)
    assert len(taken(layer, h, ctx).unique()) > 2


def test_a_higher_threshold_never_takes_fewer() -> None:
    h, ctx = inputs()
    counts = [taken(built(p=p), h, ctx) for p in (1e-9, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0)]
    assert all((low <= high).all() for low, high in pairwise(counts))
    assert counts[0].float().mean() == 1 and counts[-1].float().mean() == EXPERTS


def test_a_sum_that_equals_the_threshold_does_not_exceed_it_yet() -> None:
    """Four equal probabilities: 0.25 + 0.25 is not more than p = 0.5."""
    layer = built(num_experts=4, p=0.5, sharpness=0.0)
    h, ctx = inputs()
    (routing,) = layer(h, ctx).routings
    assert (routing.probs == 0.25).all()
    assert (routing.valid.sum(1) == math.floor(0.5 * 4) + 1).all()
    assert (routing.ids == torch.tensor([0, 1, 2])).all()  # ties go to the lowest index


def test_batch_mates_do_not_change_a_row_although_they_widen_the_record() -> None:
    layer = built(p=0.7)
    h, ctx = inputs()
    whole = layer(h, ctx)
    widths = set()
    for b in range(ROWS[0]):
        for n in range(0, ROWS[1], 5):
            alone = layer(h[b : b + 1, n : n + 1], Context(1, 1))
            torch.testing.assert_close(alone.y[0, 0], whole.y[b, n], rtol=1e-4, atol=1e-5)
            widths.add(alone.routings[0].top_k)
    assert len(widths) > 1 and max(widths) <= whole.routings[0].top_k


def test_one_expert_still_teaches_the_router() -> None:
    """Gates are not normalised again: with one expert the gate is P, not 1."""
    layer = built(p=1e-9)
    h, ctx = inputs()
    out = layer(h, ctx)
    assert (out.routings[0].gates < 1).all()
    (out.y * torch.randn(out.y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert layer.routers[0].score.proj.weight.grad.abs().max() > 1e-4


# The losses


def aux_of(layer: ExpertLayer, h: Tensor, ctx: Context) -> dict[str, tuple[Tensor, float]]:
    routings = layer(h, ctx).routings
    found = [aux for part in layer.config.balance for aux in part.losses(routings)]
    return {aux.name: (aux.value, aux.weight) for aux in found}


def test_the_entropy_loss_is_that_of_rows_not_of_their_mean() -> None:
    layer = built(sharpness=0.0)
    h, ctx = inputs()
    value, weight = aux_of(layer, h, ctx)["entropy"]
    assert value.item() == pytest.approx(math.log(EXPERTS), rel=1e-6) and weight == 1e-4
    with torch.no_grad():
        layer.routers[0].score.proj.weight.zero_()[:, :EXPERTS] = 1e4 * torch.eye(EXPERTS)
    certain = torch.eye(WIDTH)[:EXPERTS].repeat(1, 1, 1)  # each row sure of another expert
    found = aux_of(layer, certain, Context(1, EXPERTS))
    assert found["entropy"][0].item() == 0.0
    assert found["switch"][0].item() == pytest.approx(1.0)  # and the load is even


def test_the_entropy_loss_moves_the_router_towards_fewer_experts() -> None:
    layer = built(sharpness=1.0, entropy=1.0, balance=0.0, p=0.5)
    h, ctx = inputs()
    before = taken(layer, h, ctx).float().mean()
    weight = layer.routers[0].score.proj.weight
    for _ in range(30):
        layer.zero_grad()
        aux_of(layer, h, ctx)["entropy"][0].backward()
        assert weight.grad.any()
        with torch.no_grad():
            weight -= weight.grad
    assert taken(layer, h, ctx).float().mean() < before - 0.5


def test_the_balance_loss_counts_rows_and_has_its_gradient_through_q_alone() -> None:
    layer = built(p=0.6)
    h, ctx = inputs()
    value, weight = aux_of(layer, h, ctx)["switch"]
    (routing,) = layer(h, ctx).routings
    f = routing.one_hot().mean(0)
    assert f.sum().item() == pytest.approx(taken(layer, h, ctx).float().mean().item())
    torch.testing.assert_close(value, EXPERTS * (f * routing.probs.mean(0)).sum())
    assert weight == 1e-2
    router = layer.routers[0].score.proj.weight
    (through_loss,) = torch.autograd.grad(value, router)
    by_hand = EXPERTS * (f.detach() * routing.probs.mean(0)).sum()
    torch.testing.assert_close(through_loss, torch.autograd.grad(by_hand, router)[0])


def losses_of(config: RunConfig):
    model = woken(config).train()
    batch = images(4) if config.model.kind == "denoiser" else words(4)
    losses = config.objective.build(model)(model, batch, generator(0, "test"), 0.5)
    losses.total.backward()
    return model, losses


@pytest.mark.parametrize("name", ["dynamic-routing", "dynamic-routing/text"])
def test_both_losses_enter_once_per_layer(name: str) -> None:
    config = small(name)
    _, losses = losses_of(config)
    layers = range(config.model.backbone.trunk.depth)
    assert sorted((aux.key, aux.weight) for aux in losses.aux) == sorted(
        [(f"switch/layer{i}", 1e-2) for i in layers] + [(f"entropy/layer{i}", 1e-4) for i in layers]
    )
    weighted = sum(aux.weight * aux.value for aux in losses.aux)
    torch.testing.assert_close(losses.total, sum(losses.main.values()) + weighted)


# Whole models


def test_the_same_slot_serves_text_and_images() -> None:
    """Only the field ``slots`` moves from one backbone to the other."""
    ours = small("dynamic-routing").model.backbone.trunk.slots
    for config in (
        small("dynamic-routing"),
        with_slots(small("dynamic-routing/text"), *ours),
    ):
        model, losses = losses_of(config)
        layers = [m for m in model.modules() if isinstance(m, ExpertLayer)]
        assert {layer.config for layer in layers} == {ours[0].expert}
        counts = torch.cat([routing.valid.sum(1) for routing in losses.routings])
        assert counts.min() >= 1 and len(counts.unique()) > 1
        assert all(layer.routers[0].score.proj.weight.grad.any() for layer in layers)


def test_a_row_costs_its_experts_and_the_router() -> None:
    layer = built(p=0.6)
    h, ctx = inputs()
    (routing,) = layer(h, ctx).routings
    mean = mean_choices(routing)
    expert, router = 3 * WIDTH * 8, EXPERTS * WIDTH
    assert multiply_adds(layer, mean) == pytest.approx(mean * expert + router)
    assert 1 < mean < routing.top_k  # what a padded kernel would pay is more
    declared = layer_cost(layer.config, WIDTH).multiply_adds  # no row can cost more
    assert declared == EXPERTS * expert + router


def mean_choices(routing: Routing) -> float:
    return routing.counts().sum().item() / routing.ids.shape[0]


def test_every_second_layer_begins_with_the_first() -> None:
    assert slot(layers="even").sites(24) == list(range(0, 24, 2))
    assert slot().sites(24) == list(range(24))


@pytest.mark.parametrize(("k", "active"), [(1, 374.0), (2, 581.0)])
def test_the_released_model_and_its_fixed_baselines(k: int, active: float) -> None:
    """374M are also those of the dense model that the paper compares with."""
    config = dynamic_routing.paper()
    trunk = config.model.backbone.trunk
    (part,) = trunk.slots
    assert (part.expert.num_experts, part.expert.router.select.p) == (16, 0.4)
    assert (trunk.depth, trunk.width, trunk.heads) == (24, 1024, 16)
    with torch.device("meta"):
        found = count_parameters(with_slots(config, slot(k=k)).model.build())
    assert found.total / 1e9 == pytest.approx(3.5, abs=0.05)
    assert found.active / 1e6 == pytest.approx(active, abs=1.0)


def test_fixed_arms_differ_in_the_selection_and_the_entropy_loss_only() -> None:
    arms = dynamic_routing.arms()
    for modality in ("text", "image"):
        ours = arms[f"{modality}-top-p"].model.backbone.trunk.slots[0].expert
        theirs = arms[f"{modality}-top-2"].model.backbone.trunk.slots[0].expert
        router = ours.router.replace(select=theirs.router.select)
        assert ours.replace(router=router, balance=ours.balance[:1]) == theirs
        assert [part.kind for part in ours.balance] == ["switch", "entropy"]
