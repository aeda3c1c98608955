"""Chain-of-Experts: what rounds cost, what reaches which router, and where the residual goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.core.rng import generator
from coterie.experts import ExpertLayer, layer_cost
from coterie.recipes import chain_of_experts, get_recipe
from coterie.recipes.chain_of_experts import slot
from coterie.runs.config import RunConfig
from small_models import images, small, with_slots, woken, words

WIDTH, ROWS = 12, (2, 7)


def built(seed: int = 0, **options: Any) -> ExpertLayer:
    """One layer in float64: 5 routed experts and a shared one unless ``options`` say otherwise."""
    part = slot(**{"num_experts": 6, "k": 2, "hidden": 8, **options})
    layer = part.expert.build(WIDTH)
    layer.reset_parameters(torch.Generator().manual_seed(seed))
    return layer.double()


def inputs(seed: int = 0) -> tuple[Tensor, Context]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*ROWS, WIDTH, generator=rng, dtype=torch.float64), Context(*ROWS)


def silence(layer: ExpertLayer) -> ExpertLayer:
    """All experts answer zero, the shared one too."""
    with torch.no_grad():
        for parameter in [*layer.pool.parameters(), *layer.shared.parameters()]:
            parameter.zero_()
    return layer


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_round_costs_one_router_and_one_pass_of_the_shared_expert(rounds: int) -> None:
    once, several = (layer_cost(slot(rounds=c).expert, 1024) for c in (1, rounds))
    assert several.total - once.total == (rounds - 1) * 63 * 1024
    passes = (rounds - 1) * (4 + 1) * 3 * 1024 * 704
    assert several.multiply_adds - once.multiply_adds == passes + (rounds - 1) * 63 * 1024


@pytest.mark.parametrize("routing", ["shared", "frozen"])
def test_one_router_for_all_rounds_costs_nothing(routing: str) -> None:
    once, several = (layer_cost(slot(rounds=c, routing=routing).expert, 64) for c in (1, 3))
    assert once.total == several.total


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("inner", [True, False])
def test_silent_experts_answer_nothing_whatever_the_rounds(rounds: int, inner: bool) -> None:
    h, ctx = inputs()
    assert not silence(built(rounds=rounds, inner=inner))(h, ctx).y.any()
    whole = silence(built(rounds=rounds, inner=inner, outer="add"))(h, ctx).y
    assert torch.equal(whole, h if inner else torch.zeros_like(h))


def test_equal_routers_of_silent_experts_choose_alike_in_every_round() -> None:
    layer = silence(built(rounds=3))
    h, ctx = inputs()
    first, *others = layer(h, ctx).routings
    assert all(not torch.equal(first.logits, other.logits) for other in others)
    for router in layer.routers:
        router.load_state_dict(layer.routers[0].state_dict())
    first, *others = layer(h, ctx).routings
    assert len(others) == 2
    for other in others:
        assert torch.equal(first.ids, other.ids) and torch.equal(first.gates, other.gates)


def test_gradients_equal_finite_differences_for_every_router_and_expert() -> None:
    layer = built(rounds=3, routing="own")
    h, ctx = inputs()
    weight = torch.randn(*ROWS, WIDTH, generator=torch.Generator().manual_seed(9)).double()

    def value() -> Tensor:
        return (layer(h, ctx).y * weight).sum()

    value().backward()
    assert len(layer.routers) == 3
    for name, parameter in layer.named_parameters():
        step = 1e-4  # routers compute in float32: beyond their rounding, and no choice changes
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter += step * direction
            above = value()
            parameter -= 2 * step * direction
            below = value()
            parameter += step * direction
        slope = (above - below) / (2 * step)
        assert slope.item() == pytest.approx(parameter.grad.norm().item(), rel=2e-3), name


def test_experts_gather_the_gradients_of_all_rounds() -> None:
    """Cutting what later rounds send back leaves another gradient in the same experts."""
    layer = built(rounds=2)
    h, ctx = inputs()
    layer(h, ctx).y.sum().backward()
    both = layer.pool.down.grad.clone()
    layer.zero_grad()
    first = layer.combine(h, layer.router(0)(h, ctx.replace(round=0)))
    x = (h + first).detach()
    second = layer.combine(x, layer.router(1)(x, ctx.replace(round=1)))
    second.sum().backward()
    last = layer.pool.down.grad.clone()
    chosen = layer.router(0)(h, ctx).counts() > 0
    assert last.any() and chosen.any()
    assert ((both - last).flatten(1).abs().amax(1)[chosen] > 1e-9).all()


def test_permuting_experts_with_the_rows_of_all_routers_changes_nothing() -> None:
    layer, other = built(rounds=3), built(rounds=3)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for stack in other.pool.stacks().values():
            stack.copy_(stack[order])
        for router in other.routers:
            router.score.proj.weight.copy_(router.score.proj.weight[order])
    h, ctx = inputs()
    torch.testing.assert_close(other(h, ctx).y, layer(h, ctx).y, rtol=1e-5, atol=1e-5)
    counts = [[r.counts() for r in part(h, ctx).routings] for part in (layer, other)]
    assert all(torch.equal(a[order], b) for a, b in zip(*counts, strict=True))


# In whole models


def of_text(**options: Any) -> RunConfig:
    part = slot(**{"num_experts": 6, "k": 2, "hidden": 8, **options})
    return with_slots(small("chain-of-experts/text"), part)


def losses_of(config: RunConfig, model: nn.Module):
    batch = images(4) if config.model.kind == "denoiser" else words(4)
    return config.objective.build(model)(model, batch, generator(0, "test"), 0.5)


@pytest.mark.parametrize("name", ["chain-of-experts", "chain-of-experts/text"])
def test_the_balance_loss_is_per_sequence_in_every_round_and_all_are_added(name: str) -> None:
    config = small(name)
    losses = losses_of(config, woken(config).train())
    keys = {aux.key for aux in losses.aux}
    depth = config.model.backbone.trunk.depth
    assert keys == {f"switch{r}/layer{i}" for i in range(depth) for r in ("", "_round1")}
    assert all(aux.weight == 1e-3 for aux in losses.aux) and len(losses.aux) == 2 * depth
    for aux, routing in zip(losses.aux, losses.routings, strict=True):
        by_hand = []
        for ids, probs in zip(
            routing.ids.view(4, -1), routing.probs.view(4, -1, routing.num_experts), strict=True
        ):
            f = torch.bincount(ids, minlength=routing.num_experts) / ids.numel()
            by_hand.append(routing.num_experts * (f * probs.mean(0)).sum())
        torch.testing.assert_close(aux.value, torch.stack(by_hand).mean())
    task = sum(losses.main.values())
    torch.testing.assert_close(losses.total, task + 1e-3 * sum(aux.value for aux in losses.aux))


def test_the_same_slot_serves_text_and_images() -> None:
    """Only the field ``slots`` moves from one backbone to the other."""
    ours = small("chain-of-experts").model.backbone.trunk.slots
    words_config = with_slots(small("chain-of-experts/text"), *ours)
    for config in (small("chain-of-experts"), words_config):
        model = woken(config).train()
        layers = [m for m in model.modules() if isinstance(m, ExpertLayer)]
        assert {layer.config for layer in layers} == {ours[0].expert} and len(layers) == 2
        losses_of(config, model).total.backward()
        for layer in layers:
            for router in layer.routers:
                assert router.score.proj.weight.grad.any()


def test_where_the_stream_goes() -> None:
    """delta: s + x_C - x_0; add: s + x_C; replace: x_C, with x_0 = norm(s)."""
    ends: dict[str, Tensor] = {}
    for outer in ("delta", "add", "replace"):
        model = woken(of_text(outer=outer)).double()
        block = model.backbone.trunk.blocks[0]
        block.norm2.register_forward_hook(lambda _, args, out: ends.update(s=args[0], x_0=out))
        width = block.norm2.normalized_shape[0]
        z = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1)).double()
        ends[outer] = block(z, Context(2, 5))[0]
    torch.testing.assert_close(ends["add"], ends["s"] + ends["replace"])
    torch.testing.assert_close(ends["delta"], ends["add"] - ends["x_0"])


def test_replacing_the_stream_is_refused_where_a_gate_closes_it() -> None:
    with pytest.raises(ConfigError, match=r"slots\.0\.residual"):
        with_slots(small("chain-of-experts"), slot(6, 2, 2, 8, outer="replace"))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_arms_have_equal_routed_compute(modality: str) -> None:
    """Two rounds cost one more router and one more pass of the shared expert, nothing else."""
    arms = chain_of_experts.arms()
    parts = {
        name: config.model.backbone.trunk
        for name, config in arms.items()
        if name.startswith(modality)
    }
    plain = parts[f"{modality}-moe"]
    width, moe = plain.width, plain.slots[0].expert
    hidden = moe.experts.hidden
    before = layer_cost(moe, width)
    for name, trunk in parts.items():
        expert = trunk.slots[0].expert
        assert expert.rounds * expert.router.select.k == moe.router.select.k, name
        if expert.num_experts == moe.num_experts and name != f"{modality}-moe":
            after = layer_cost(expert, width)
            router = moe.num_experts * width
            own = router if expert.round_routing == "own" else 0
            assert after.total - before.total == own
            extra = router + 3 * width * hidden
            assert after.multiply_adds - before.multiply_adds == extra


def test_fewer_experts_save_a_quarter_of_the_pool() -> None:
    arms = chain_of_experts.arms()
    pools = {
        name: arms[f"text-{name}"].model.backbone.trunk.slots[0].expert
        for name in ("moe", "coe-24")
    }
    assert [pools[n].num_experts + pools[n].shared.count for n in pools] == [32, 24]


def test_the_published_layout() -> None:
    config = get_recipe("chain-of-experts").config("paper")
    (part,) = config.model.backbone.trunk.slots
    expert = part.expert
    assert (expert.num_experts, expert.shared.count, expert.experts.hidden) == (63, 1, 704)
    assert (expert.rounds, expert.router.select.k, expert.router.weight) == (2, 4, "raw")
    with torch.device("meta"):
        total = count_parameters(config.model.build()).total
    embeddings = 2 * 102_400 * 1024
    # The 544M that are printed are units of 2^20.
    assert (total - embeddings) / 2**20 == pytest.approx(544, abs=1)
