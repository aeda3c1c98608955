"""The policy: tokens and their positions, noise in what attention reads, routing by noise alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.backbones import PolicyConfig, SlotConfig, TrunkConfig
from coterie.backbones.policy import POLICY_TRUNK
from coterie.backbones.trunk import Trunk
from coterie.cache import fold_by_step
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.denoiser import Denoiser, DenoiserConfig
from coterie.experts import BALANCES, ExpertLayer, ExpertLayerConfig, RouterConfig
from coterie.solvers import GRIDS

EDM: dict[str, Any] = {
    "process": {"kind": "ve", "sigma_min": 0.001, "sigma_max": 80.0},
    "precondition": "edm",
    "view": "x0",
}
NOISE = {"kind": "noise_level", "hidden": 32, "silu": False, "init_std": 0.5}


def slot(k: int = 2, **changes: Any) -> SlotConfig:
    router = RouterConfig(score=NOISE, select={"kind": "random", "k": k}, weight="renorm")
    expert = ExpertLayerConfig(num_experts=4, experts={"kind": "swiglu", "hidden": 8})
    return SlotConfig(slot="ffn", expert=expert.replace(router=router, **changes))


def make(*slots: SlotConfig, seed: int = 0, **trunk: Any) -> Denoiser:
    """A small policy with every parameter moved, in eval mode."""
    sizes = POLICY_TRUNK.replace(width=16, depth=2, mlp_hidden=24, slots=slots, **trunk)
    config = DenoiserConfig(backbone=PolicyConfig(horizon=4, num_classes=3, trunk=sizes), **EDM)
    torch.manual_seed(seed)
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def asked(batch: int = 3, seed: int = 0) -> tuple[Tensor, Condition]:
    rng = torch.Generator().manual_seed(seed)
    cond = Condition(
        label=torch.arange(batch) % 4 - 1, tokens=torch.randn(batch, 1, 4, generator=rng)
    )
    return torch.randn(batch, 4, 2, generator=rng), cond


def sigmas(*values: float) -> Tensor:
    return torch.tensor(values)


def test_tokens_are_noise_goal_observations_and_actions() -> None:
    config = PolicyConfig(horizon=8, num_classes=4, observations=2)
    assert config.tokens == 12 and config.replace(num_classes=0, observations=0).tokens == 9
    assert config.sample_shape == (8, 2) and config.observation_shape == (2, 4)


def test_an_observation_has_the_position_of_the_first_action() -> None:
    """And the goal has one of its own, the noise token none."""
    seen: list[Tensor] = []
    x, cond = asked()
    t = sigmas(0.5, 0.5, 0.5)
    model = make()
    model.backbone.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x, t, cond)
        before = seen[-1]
        model.backbone.positions.zero_()
        model(x, t, cond)
    moved = (before - seen[-1])[0]
    table = make().backbone.positions.detach()
    expected = torch.cat([torch.zeros(1, 16), table[:1], table[1:2], table[1:]])
    assert torch.allclose(moved, expected, atol=1e-6)


def test_a_block_reads_the_noise_and_replaces_the_stream_as_published() -> None:
    """x + Attn(RMS1(x) + e), then x = RMS2(x), then x + FFN(x)."""
    model = make()
    block = model.backbone.trunk.blocks[0]
    x, e = torch.randn(2, 5, 16), torch.randn(2, 16)
    with torch.no_grad():
        found, _ = block(x, Context(2, 5, embedding=e))
        middle = x + block.attention(block.norm1(x) + e[:, None])
        plain = block.norm2(middle)
        assert torch.allclose(found, plain + block.ffn(plain), atol=1e-6)
        kept = make(residual="stream").backbone.trunk.blocks[0]
        found, _ = kept(x, Context(2, 5, embedding=e))
        assert torch.allclose(found, middle + block.ffn(plain), atol=1e-6)


def test_later_actions_do_not_reach_earlier_ones() -> None:
    model = make(slot())
    x, cond = asked()
    t = sigmas(0.1, 1.0, 10.0)
    changed = x.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        before, after = model(x, t, cond).value, model(changed, t, cond).value
    gap = (before - after).abs().amax(dim=(0, 2))
    assert gap[:2].max() == 0 and (gap[2:] > 0).all()


def test_experts_depend_on_the_noise_alone() -> None:
    model = make(slot())
    t = sigmas(0.02, 0.9, 30.0)
    choices = []
    for seed in (0, 1):
        x, cond = asked(seed=seed)
        shifted = cond.replace(label=(cond.label + 1) % 3) if seed else cond
        with torch.no_grad():
            choices.append([(r.ids, r.gates) for r in model(x, t, shifted).routings])
    for (ids, gates), (other, weights) in zip(*choices):
        assert torch.equal(ids, other) and torch.equal(gates, weights)
    assert any(
        len({tuple(row) for row in ids.sort(dim=1).values.tolist()}) > 1 for ids, _ in choices[0]
    )


def test_two_noise_levels_of_a_batch_are_routed_apart() -> None:
    model = make(slot())
    x, cond = asked(2)
    with torch.no_grad():
        both = model(x, sigmas(0.02, 30.0), cond)
        for row, sigma in enumerate((0.02, 30.0)):
            rows = torch.tensor([row])
            alone = model(x[rows], sigmas(sigma), cond.index(rows))
            assert torch.allclose(alone.value, both.value[rows], atol=1e-6)
            assert torch.equal(alone.routings[0].ids[0], both.routings[0].ids[row])


def test_gates_of_the_chosen_sum_to_one() -> None:
    model = make(slot()).train()
    x, cond = asked()
    made = model(x, sigmas(0.1, 1.0, 10.0), cond, rng=torch.Generator().manual_seed(0))
    for routing in made.routings:
        assert torch.allclose(routing.gates.sum(dim=1), torch.ones(3))
        assert all(len(set(row)) == 2 for row in routing.ids.tolist())


def test_training_explores_what_evaluation_does_not() -> None:
    """Multinomial draws against the best k; the gates teach the router either way."""
    model = make(slot()).train()
    x, cond = asked()
    t = sigmas(0.5, 0.5, 0.5)
    rng = torch.Generator().manual_seed(0)
    drawn = {str(model(x, t, cond, rng=rng).routings[0].ids.tolist()) for _ in range(12)}
    best = {str(model.eval()(x, t, cond, rng=rng).routings[0].ids.tolist()) for _ in range(4)}
    assert len(drawn) > 1 and len(best) == 1
    model.train()(x, t, cond, rng=rng).value.square().mean().backward()
    router = model.backbone.trunk.blocks[0].ffn.routers[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())


def test_a_frozen_router_decides_as_in_evaluation_and_learns_nothing() -> None:
    model = make(slot()).train()
    routers = [m for layer in layers(model) for m in layer.routers]
    for router in routers:
        router.requires_grad_(False).eval()
    x, cond = asked()
    t = sigmas(0.5, 0.5, 0.5)
    rng = torch.Generator().manual_seed(0)
    drawn = {str(model(x, t, cond, rng=rng).routings[0].ids.tolist()) for _ in range(8)}
    assert len(drawn) == 1
    model(x, t, cond, rng=rng).value.square().mean().backward()
    assert all(p.grad is None for router in routers for p in router.parameters())


def layers(model: Denoiser) -> list[ExpertLayer]:
    return [module for module in model.modules() if isinstance(module, ExpertLayer)]


def test_all_experts_are_their_weighted_mean_and_equal_ones_are_one() -> None:
    layer = layers(make(slot(k=4)))[0]
    h, e = torch.randn(2, 5, 16), torch.randn(2, 16)
    ctx = Context(2, 5, time_embedding=e)
    with torch.no_grad():
        found = layer(h, ctx)
        gates = found.routings[0].probs
        modules = layer.pool.unpack()
        mean = sum(gates[:, e, None, None] * one(h) for e, one in enumerate(modules))
        assert torch.allclose(found.y, mean, atol=1e-5)
        for stack in layer.pool.parameters():
            stack.copy_(stack[:1].expand_as(stack))
        assert torch.allclose(layer(h, ctx).y, layer.pool.unpack()[0](h), atol=1e-5)


def test_the_balance_loss_is_k_when_all_experts_are_used_alike() -> None:
    """Mean gates times tokens routed, as in the released code: not 1, as in the Switch form."""
    balance = BALANCES.parse({"kind": "switch", "per_choice": False, "importance": "gates"}).build()
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    even = torch.full((4, 4), 0.25)
    for k, chosen in ((2, ids), (4, torch.arange(4).expand(4, 4))):
        gates = torch.full((4, k), 1 / k)
        routing = Routing("sample", 4, chosen, gates, even, even.log(), batch=(4, 11))
        assert balance.value(routing) == pytest.approx(k)


def test_the_cache_answers_what_the_model_answers_at_every_step() -> None:
    model = make(slot())
    times = GRIDS.parse("lambda").build(model.process, 10)
    x, cond = asked()
    folded = fold_by_step(model, times, cond=cond)
    for time in times[:-1]:
        t = time.float().expand(3)
        with torch.no_grad():
            assert torch.allclose(folded(x, t, cond).value, model(x, t, cond).value, atol=1e-5)
    with pytest.raises((ConfigError, DataError)):
        folded(x, torch.full((3,), 0.123), cond)
    with pytest.raises(ConfigError, match="training"):
        fold_by_step(model.train(), times, cond=cond)


def test_the_noise_token_is_two_maps_of_a_quarter_of_log_sigma() -> None:
    model = make()
    token, t = model.backbone.noise, sigmas(0.001, 0.5, 80.0)
    with torch.no_grad():
        found = token(model.process.time_input(t))
        inner = F.linear(t.log()[:, None] / 4, token.inner.weight, token.inner.bias)
        assert torch.allclose(found, F.linear(inner, token.outer.weight), atol=1e-5)
    assert token.outer.bias is None


def test_what_does_not_fit_is_named() -> None:
    model = make()
    x, cond = asked()
    t = sigmas(1.0, 1.0, 1.0)
    with pytest.raises(DataError, match=r"x: \(3, 5, 2\) .*\(4, 2\)"):
        model(torch.randn(3, 5, 2), t, cond)
    with pytest.raises(DataError, match=r"cond\.tokens: None .*observations \(3, 1, 4\)"):
        model(x, t, cond.replace(tokens=None))
    with pytest.raises(DataError, match=r"cond\.label: None .*goals \[B\], B = 3"):
        model(x, t, cond.replace(label=None))
    with pytest.raises(DataError, match=r"label: 3 .*0\.\.2"):
        model(x, t, cond.replace(label=torch.tensor([0, 3, 1])))


def test_the_trunk_names_what_it_cannot_add() -> None:
    with pytest.raises(ConfigError, match=r"residual: 'normalised' .*identity"):
        TrunkConfig.from_dict({"residual": "normalised"})
    with pytest.raises(ConfigError, match=r"modulation: 'add' .*8 channels, the stream 16"):
        Trunk(TrunkConfig(width=16, modulation="add"), 4, condition_width=8)
