"""Masks and prototypes as their cards state them, at the layer's own level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expert_cases import BATCH, CASES, STEPS, TIME_WIDTH, WIDTH, build, config, context, inputs

from coterie.core.context import Context
from coterie.experts.kinds import Affine, SwiGLU
from coterie.experts.windows import sliding_windows

# Masks (Switch-DiT, DTR): the slot reads m = 1 + layer(z)


def test_mask_is_one_at_the_start_and_only_experts_learn_first() -> None:
    layer = config("switch_dit").build(WIDTH, TIME_WIDTH)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    h, ctx = inputs(7), context(7)
    out = layer(h, ctx)
    assert (out.y == 0).all()
    (out.y * torch.randn(out.y.shape)).sum().backward()
    assert layer.routers[0].score.proj.weight.grad.abs().max() == 0
    assert layer.pool.weight.grad.abs().max() > 0
    with torch.no_grad():
        layer.pool.weight.normal_()
    (layer(h, ctx).y * torch.randn(out.y.shape)).sum().backward()
    assert layer.routers[0].score.proj.weight.grad.abs().max() > 0


def test_affine_mask_equals_its_formula() -> None:
    layer = build("switch_dit")
    h, ctx = inputs(20), context(20)
    out = layer(h, ctx)
    tau = F.silu(ctx.time_embedding)
    p = layer.routers[0].score.proj(tau).softmax(-1)
    for b in range(BATCH):
        best = p[b].argsort(descending=True)[:2]
        expected = sum(p[b, e] * (h[b] @ layer.pool.weight[e].T + layer.pool.bias[e]) for e in best)
        torch.testing.assert_close(out.y[b], expected, atol=1e-5, rtol=1e-5)


def test_sampling_at_one_noise_level_folds_once_and_equals_training_mode() -> None:
    layer = build("switch_dit")
    ctx = context(20)
    ctx = ctx.replace(time_embedding=ctx.time_embedding[:1].expand(BATCH, -1))
    h = inputs(20)
    with torch.no_grad():
        folded = layer(h, ctx).y
    torch.testing.assert_close(folded, layer(h, ctx).y, atol=1e-5, rtol=1e-5)


def test_channel_windows_equal_the_published_mask() -> None:
    layer = build("dtr")
    size = int(WIDTH * 0.8)
    table = sliding_windows(STEPS, WIDTH, size, 4.0)
    steps = torch.arange(STEPS)
    ctx = Context(STEPS, 3, step_index=steps, num_steps=STEPS)
    mask = 1 + layer(torch.randn(STEPS, 3, WIDTH), ctx).y
    assert torch.equal(mask, table[:, None, :].expand(-1, 3, -1).float())
    assert layer.pool.num_experts == WIDTH - size + 1
    assert not list(layer.parameters()) and not layer.state_dict()


def test_all_channels_shared_is_the_dense_model_bit_for_bit() -> None:
    layer = build("dtr", experts={"kind": "channel_window", "share": 1.0})
    h = inputs(5)
    assert torch.equal((1 + layer(h, context(5)).y) * h, h)


def test_random_masks_keep_the_share_per_step() -> None:
    experts = {"kind": "channel_window", "share": 0.75, "mode": "random", "num_masks": STEPS}
    router = {**CASES["dtr"]["router"], "score": {"kind": "noise_window", "alpha": 1.0}}
    layer = build("dtr", experts=experts, router=router)
    ctx = Context(STEPS, 1, step_index=torch.arange(STEPS), num_steps=STEPS)
    out = layer(torch.zeros(STEPS, 1, WIDTH), ctx)
    mask = 1 + out.y[:, 0]
    assert out.routings[0].ids[:, 0].tolist() == list(range(STEPS))
    assert (mask.sum(1) == 12).all() and len(mask.unique(dim=0)) > STEPS // 2
    again = build("dtr", experts=experts, router=router)
    assert torch.equal(layer.pool.delta, again.pool.delta)


# ProMoE


def test_prototype_layer_equals_its_formula() -> None:
    layer = build("promoe")
    h, ctx = inputs(6), context(6, null=(1,))
    out = layer(h, ctx)
    experts, shared = layer.pool.unpack(), layer.shared.pool.unpack()[0]
    cosine = F.cosine_similarity(h[0][:, None], layer.routers[0].score.prototypes[None], dim=-1)
    for n in range(6):
        best = int(cosine[n].argmax())
        expected = cosine[n, best] * experts[best](h[0, n]) + shared(h[0, n])
        torch.testing.assert_close(out.y[0, n], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.y[1], experts[6](h[1]) + shared(h[1]), atol=1e-5, rtol=1e-5)


def test_guided_halves_use_their_own_experts() -> None:
    """[conditional; null] as one batch equals two calls."""
    layer = build("promoe")
    h = inputs(6).detach()
    both = layer(h, context(6, null=(1,))).y
    apart = [
        layer(h[i : i + 1], Context(1, 6, label=torch.tensor([[2], [-1]][i]))).y for i in (0, 1)
    ]
    torch.testing.assert_close(both, torch.cat(apart), atol=1e-6, rtol=1e-5)


def test_a_recorded_routing_can_be_replayed() -> None:
    layer = build("dit_moe")
    h, ctx = inputs(6), context(6)
    out = layer(h, ctx)
    assert torch.equal(layer.combine(h, out.routings[0].detach()), out.y)
    assert isinstance(layer.config.kind, SwiGLU) and not isinstance(layer.config.kind, Affine)
