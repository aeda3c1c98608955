"""The layer as each card states it: identities, gradients, rounds, masks, counts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from expert_cases import CASES, TIME_WIDTH, WIDTH, build, config, context, inputs, run

from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.experts import (
    ExpertLayerConfig,
    ExpertPool,
    Segmentation,
    SharedConfig,
    layer_cost,
    share_cells,
)
from coterie.experts.kinds import GeluMLP, SwiGLU


def simple(num_experts: int, k: int, **fields: object):
    layer = ExpertLayerConfig.from_dict(
        {
            "num_experts": num_experts,
            "experts": {"kind": "swiglu", "hidden": 8},
            "router": {"select": {"kind": "top_k", "k": k}},
            **fields,
        }
    ).build(WIDTH)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    return layer


# What holds for every configuration


@pytest.mark.parametrize("name", CASES)
def test_every_trainable_parameter_gets_gradient(name: str) -> None:
    """From the output alone, no loss attached. Channel windows ignore their input."""
    layer = build(name)
    _, grads = run(layer, inputs(64), context(64))
    for key, grad in grads.items():
        assert grad.isfinite().all()
        if key != "h" or name != "dtr":
            assert grad.abs().max() > 0, key


@pytest.mark.parametrize("name", CASES)
def test_state_dict_round_trip_gives_the_same_output(name: str) -> None:
    layer = build(name)
    other = config(name).build(WIDTH, TIME_WIDTH)
    other.load_state_dict(layer.state_dict())
    h, ctx = inputs(9), context(9)
    assert torch.equal(layer(h, ctx).y, other(h, ctx).y)


@pytest.mark.parametrize("name", CASES)
def test_configuration_survives_json_and_meta_device(name: str) -> None:
    made = config(name)
    assert ExpertLayerConfig.from_json(made.to_json()) == made
    with torch.device("meta"):
        shapes = made.build(WIDTH, TIME_WIDTH)
    real = made.build(WIDTH, TIME_WIDTH)
    assert count_parameters(shapes) == count_parameters(real)


@pytest.mark.parametrize("name", CASES)
def test_initialisation_is_a_function_of_the_generator(name: str) -> None:
    first, second = build(name), config(name).build(WIDTH, TIME_WIDTH)
    states = []
    for layer, seed in ((first, 7), (second, 7), (second, 8)):
        layer.reset_parameters(torch.Generator().manual_seed(seed))
        states.append({k: v.clone() for k, v in layer.state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if any(value.abs().max() > 0 for value in states[0].values()):
        assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("promoe_expert_choice", "hash")])
def test_token_permutation_permutes_the_output(name: str) -> None:
    layer, ctx = build(name), context(8)
    h = inputs(8).detach()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        layer(h[:, order], ctx).y, layer(h, ctx).y[:, order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["dit_moe", "promoe", "switch_dit", "top_p", "dense"])
def test_permuting_experts_with_their_router_rows_changes_nothing(name: str) -> None:
    layer, other = build(name), build(name)
    candidates = layer.routers[0].num_experts
    order = torch.randperm(candidates, generator=torch.Generator().manual_seed(0))
    full = torch.cat([order, torch.arange(candidates, layer.pool.num_experts)])
    with torch.no_grad():
        for stack in other.pool.stacks().values():
            stack.copy_(stack[full])
        last = {"proj.weight", "proj.bias", "prototypes"}
        for key, value in other.routers[0].score.named_parameters():
            if key in last:
                value.copy_(value[order])
    h, ctx = inputs(9), context(9)
    torch.testing.assert_close(layer(h, ctx).y, other(h, ctx).y, atol=1e-5, rtol=1e-5)


# Token experts (DiT-MoE, DeepSeekMoE)


def test_one_expert_equals_the_plain_network() -> None:
    for kind in ({"kind": "swiglu", "hidden": 8}, {"kind": "gelu_mlp", "hidden": 8}):
        layer = simple(1, 1, experts=kind)
        (plain,) = layer.pool.unpack()
        h = inputs(7)
        torch.testing.assert_close(layer(h, Context(2, 7)).y, plain(h))


def test_all_experts_equal_the_dense_mixture() -> None:
    layer = simple(5, 5)
    h = inputs(7)
    out = layer(h, Context(2, 7))
    probs = out.routings[0].probs.view(2, 7, 5)
    modules = layer.pool.unpack()
    mixture = sum(probs[..., e, None] * modules[e](h) for e in range(5))
    torch.testing.assert_close(out.y, mixture, atol=1e-5, rtol=1e-5)


def test_equal_experts_answer_the_expert_times_the_sum_of_gates() -> None:
    layer = simple(6, 2)
    for e in range(1, 6):
        layer.pool.load_expert_state(e, layer.pool.expert_state(0))
    h = inputs(7)
    out = layer(h, Context(2, 7))
    plain = layer.pool.unpack()[0](h)
    scale = out.routings[0].gates.sum(1).view(2, 7, 1)
    torch.testing.assert_close(out.y, scale * plain, atol=1e-5, rtol=1e-5)


def test_shared_experts_have_weight_one_and_stay_outside_the_softmax() -> None:
    plain, shared = simple(6, 2), simple(6, 2, shared={"hidden": 8, "count": 2})
    shared.load_state_dict(plain.state_dict(), strict=False)
    assert shared.shared.pool.gate_up.shape == (1, 32, WIDTH)
    h, ctx = inputs(7), Context(2, 7)
    first, second = plain(h, ctx), shared(h, ctx)
    torch.testing.assert_close(second.y - first.y, shared.shared.pool.unpack()[0](h))
    assert torch.equal(first.routings[0].probs, second.routings[0].probs)


def test_merged_shared_experts_equal_separate_ones() -> None:
    merged = SharedConfig(hidden=4, count=2).build(SwiGLU(), WIDTH)
    gate_up, down = merged.pool.gate_up[0].detach(), merged.pool.down[0].detach()
    h, total = inputs(3), torch.zeros(())
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        gate, up = h @ gate_up[:8][rows].T, h @ gate_up[8:][rows].T
        total = total + (F.silu(gate) * up) @ down[:, rows].T
    torch.testing.assert_close(merged(h), total)


def test_self_gated_shared_experts_equal_their_formula() -> None:
    for count in (1, 3):
        shared = SharedConfig(hidden=4, count=count, gate="self").build(GeluMLP(), WIDTH)
        h = inputs(3)
        logits = h @ shared.gate.weight.T
        gates = logits.sigmoid() if count == 1 else logits.softmax(-1)
        modules = shared.pool.unpack()
        expected = sum(gates[..., e, None] * modules[e](h) for e in range(count))
        torch.testing.assert_close(shared(h), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [SwiGLU(hidden=12), GeluMLP(hidden=12)])
def test_slices_of_one_network_sum_to_it(kind) -> None:
    """Segmentation of a dense network: m slices, all on with weight 1, are the network."""
    whole = ExpertPool(kind, 1, WIDTH)
    parts = ExpertPool(kind.with_hidden(4), 3, WIDTH)
    own = whole.expert_state(0)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        if "gate_up" in own:
            halves = own["gate_up"].chunk(2)
            state = {"gate_up": torch.cat([half[rows] for half in halves])}
        else:
            first = own["down_bias"] * float(i == 0)  # the output bias belongs to one slice
            state = {"up": own["up"][rows], "up_bias": own["up_bias"][rows], "down_bias": first}
        parts.load_expert_state(i, {**state, "down": own["down"][:, rows]})
    h = inputs(5)
    total = sum(module(h) for module in parts.unpack())
    torch.testing.assert_close(total, whole.unpack()[0](h), atol=1e-5, rtol=1e-5)


def test_segmentation_resolves_and_keeps_parameters_and_cost() -> None:
    rule = Segmentation(base_experts=16, base_k=2, base_hidden=64, segment=4, shared=1)
    numbers = rule.resolve()
    assert (numbers.num_experts, numbers.top_k, numbers.num_shared) == (63, 7, 1)
    assert (numbers.hidden, numbers.hidden_gap) == (16, 0)
    fine, coarse = layer_cost(rule.layer(), 32), layer_cost(rule.twin().layer(), 32)
    router = lambda n: n * 32  # noqa: E731
    assert fine.total - router(63) == coarse.total - router(16) == 16 * 3 * 32 * 64
    assert fine.active - router(63) == coarse.active - router(16) == 2 * 3 * 32 * 64
    assert fine.multiply_adds == fine.active and coarse.multiply_adds == coarse.active
    assert "63 routed, 7 used, 1 shared" in rule.summary(32)
    assert Segmentation(base_hidden=10, segment=4).resolve().hidden_gap == -2
    with pytest.raises(ConfigError, match=r"shared: 8 .* 0\.\.7"):
        Segmentation.from_dict({"base_hidden": 64, "shared": 8})


def test_parameter_formulas_of_the_papers() -> None:
    """Expert layers of DiT-MoE S/2 8E2A, ProMoE-S, Switch-DiT S (per layer, width 384)."""
    d = 384
    dit = ExpertLayerConfig(
        num_experts=8, experts=SwiGLU(ratio=4), shared=SharedConfig(hidden=d, count=2)
    )
    cost = layer_cost(dit, d)
    assert cost.total == 8 * 3 * d * 4 * d + 3 * d * 2 * d + 8 * d
    assert cost.active == 30 * d * d + 8 * d
    promoe = ExpertLayerConfig.from_dict(
        {**CASES["promoe"], "num_experts": 12, "experts": {"kind": "gelu_mlp", "hidden": 2 * d},
         "shared": {"hidden": 2 * d}}
    )  # fmt: skip
    mlp = 2 * d * 2 * d + 3 * d
    cost = layer_cost(promoe, d)
    assert cost.total == 14 * mlp + 12 * d and cost.active == 2 * mlp + 12 * d
    switch = layer_cost(config("switch_dit"), d)
    assert switch.total == d * 3 + 3 + 3 * (d * d + d)
    assert 12 * switch.total == pytest.approx(5.34e6, rel=0.01)
    assert layer_cost(config("dtr"), d).total == 0


# Rounds (Chain-of-Experts), state (RMoE), pools (ReXMoE)


def test_rounds_apply_the_pool_repeatedly_with_a_residual_inside() -> None:
    layer = build("chain", dispatch="loop")
    h, ctx = inputs(6), context(6)
    out = layer(h, ctx)
    x = h
    for router, routing in zip(layer.routers, out.routings):
        again = router(x, ctx)
        assert torch.equal(again.ids, routing.ids)
        x = x + layer.combine(x, again)
    torch.testing.assert_close(out.y, x - h, atol=1e-5, rtol=1e-5)
    assert [r.round for r in out.routings] == [0, 1]


def test_one_round_equals_the_plain_layer_bit_for_bit() -> None:
    once, plain = build("chain", rounds=1), build("chain")
    once.load_state_dict({k: v for k, v in plain.state_dict().items() if "routers.1" not in k})
    h, ctx = inputs(6), context(6)
    assert torch.equal(once(h, ctx).y, plain.combine(h, plain.routers[0](h, ctx)))
    extra = count_parameters(plain).total - count_parameters(once).total
    assert extra == 6 * WIDTH


def test_one_expert_for_three_rounds_is_a_residual_chain() -> None:
    layer = simple(1, 1, rounds=3)
    (expert,) = layer.pool.unpack()
    h = inputs(5)
    x = h
    for _ in range(3):
        x = x + expert(x)
    torch.testing.assert_close(layer(h, Context(2, 5)).y, x - h, atol=1e-5, rtol=1e-5)


def test_shared_router_and_no_inner_residual() -> None:
    shared = build("chain", round_routing="shared")
    assert len(shared.routers) == 1 and shared.router(1) is shared.routers[0]
    bare = build("chain", inner_residual=False)
    h, ctx = inputs(5), context(5)
    x = h
    for router in bare.routers:
        x = bare.combine(x, router(x, ctx))
    torch.testing.assert_close(bare(h, ctx).y, x, atol=1e-5, rtol=1e-5)
    output = build("chain", inner_residual=False, answer="output")
    assert torch.equal(output(h, ctx).y, bare(h, ctx).y)


def test_a_frozen_decision_holds_for_all_rounds() -> None:
    frozen, shared = (build("chain", round_routing=kind) for kind in ("frozen", "shared"))
    h, ctx = inputs(5), context(5)
    first, second = frozen(h, ctx).routings
    assert (first.round, second.round) == (0, 1)
    assert torch.equal(first.ids, second.ids) and torch.equal(first.gates, second.gates)
    x = h
    for _ in range(2):
        x = x + frozen.combine(x, first)
    torch.testing.assert_close(frozen(h, ctx).y, x - h, atol=1e-5, rtol=1e-5)
    again = shared(h, ctx).routings  # one router asked twice sees another input
    assert torch.equal(again[0].logits, first.logits)
    assert not torch.equal(again[1].logits, first.logits)


def test_norm_between_rounds_and_the_whole_output() -> None:
    layer = build("chain", inner_norm=True, answer="output")
    h, ctx = inputs(5), context(5)
    x = h + layer.combine(h, layer.router(0)(h, ctx))
    read = x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
    x = x + layer.combine(read, layer.router(1)(read, ctx))
    torch.testing.assert_close(layer(h, ctx).y, x, atol=1e-5, rtol=1e-5)


def test_shared_experts_may_weigh_half() -> None:
    layer = build("dit_moe", shared={"hidden": 4, "scale": 0.5})
    x = inputs(5)
    whole = build("dit_moe", shared={"hidden": 4})
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(2 * layer.shared(x), whole.shared(x))


def test_router_state_travels_and_passes_through_layers_without_one() -> None:
    layer, plain = build("recurrent"), build("dit_moe")
    h, ctx = inputs(5), context(5)
    out = layer(h, ctx)
    assert out.state is out.routings[-1].state and out.state.shape == (10, 6)
    assert plain(h, ctx.replace(state=out.state)).state is out.state
    second = layer(h, ctx.replace(state=out.state))
    assert not torch.equal(second.routings[0].logits, out.routings[0].logits)


def test_cells_shared_by_layers_count_once() -> None:
    layers = torch.nn.ModuleList(build("recurrent") for _ in range(3))
    share_cells(layers)
    p = 6
    per_layer = 2 * (p * WIDTH + p * 5) + 5 * 3 * WIDTH * 8
    assert count_parameters(layers).total == 3 * per_layer + 6 * p * p + 6 * p


def test_a_pool_serves_several_layers_and_gets_the_sum_of_gradients() -> None:
    made = config("dit_moe")
    pool = made.build_pool(WIDTH)
    layers = torch.nn.ModuleList(made.build(WIDTH, pool=pool) for _ in range(2))
    assert not any(k.split(".", 1)[1] == "pool.gate_up" for k in layers.state_dict())
    assert layers[0].pool is layers[1].pool is pool
    apart = [copy.deepcopy(layer) for layer in layers]
    h, ctx = inputs(7), context(7)
    for layer in layers:
        layer(h, ctx).y.square().sum().backward()
    for layer in apart:
        layer(h, ctx).y.square().sum().backward()
    assert apart[0].pool is not pool and pool.gate_up.grad is not None
    total = apart[0].pool.gate_up.grad + apart[1].pool.gate_up.grad
    torch.testing.assert_close(pool.gate_up.grad, total)
    assert pool.active_share()["gate_up"] == pytest.approx(4 / 8)
    before = pool.gate_up.detach().clone()
    layers[0].reset_parameters(torch.Generator().manual_seed(9))
    assert torch.equal(pool.gate_up, before)
    with pytest.raises(ConfigError, match=r"pool\.num_experts: 3"):
        made.build(WIDTH, pool=ExpertPool(made.kind, 3, WIDTH))
