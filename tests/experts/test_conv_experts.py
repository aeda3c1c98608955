"""Convolutional experts: one mixed kernel per sample equals every expert's own convolution."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, ExpertLayerConfig, ExpertPool, dispatch, plan
from coterie.experts.dispatch import BACKENDS, available
from coterie.experts.dispatch.backends import run_fold
from coterie.experts.kinds import Affine, Conv

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"kernel": 1},
    "wider, no bias": {"out": 6, "bias": False},
    "stride 2, no padding": {"stride": 2, "padding": 0},
    "5x5, dilated": {"kernel": 5, "dilation": 2, "out": 8},
    "grouped": {"groups": 2, "out": 6},
}
GATES = {"one of four": 1, "two of four": 2, "all": 4}
BATCH, WIDTH, EXPERTS = 3, 4, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool_of(kind: Conv, num_experts: int = EXPERTS, width: int = WIDTH) -> ExpertPool:
    pool = ExpertPool(kind, num_experts, width)
    for number, stack in enumerate(pool.stacks().values()):
        stack.data.copy_(rand(*stack.shape, seed=number + 5))
    return pool


def routing_of(k: int, gates: Tensor, batch: int = BATCH) -> Routing:
    ids = rand(batch, EXPERTS, seed=9).argsort(dim=1)[:, :k]
    flat = torch.full((batch, EXPERTS), 1 / EXPERTS)
    return Routing("sample", EXPERTS, ids, gates, flat, flat.log(), (batch, 30))


def oracle(x: Tensor, routing: Routing, pool: ExpertPool, always: nn.Module | None) -> Tensor:
    """Every chosen expert's convolution of one sample after the other, summed with its gate."""
    kernels, biases = pool.weight.unbind(0), getattr(pool, "bias", None)
    stride, padding, dilation, groups = pool.kind.geometry
    rows = []
    for row, (ids, gates) in enumerate(zip(routing.ids.tolist(), routing.gates)):
        y = torch.zeros(()) if always is None else always(x[row : row + 1])
        for expert, gate in zip(ids, gates):
            bias = None if biases is None else biases[expert]
            y = y + gate * torch.conv2d(
                x[row : row + 1], kernels[expert], bias, stride, padding, dilation, groups
            )
        rows.append(y)
    return torch.cat(rows)


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad((y * rand(*y.shape, seed=2)).sum(), leaves)]


@pytest.mark.parametrize("always", [False, True], ids=["", "with a kernel always on"])
@pytest.mark.parametrize("k", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_one_mixed_kernel_equals_every_experts_convolution(
    geometry: dict[str, Any], k: int, always: bool
) -> None:
    kind = Conv.from_dict(geometry)
    pool, x = pool_of(kind), rand(BATCH, WIDTH, 9, 11).requires_grad_()
    gates = rand(BATCH, k, seed=3).requires_grad_()
    base = kind.module(WIDTH) if always else None
    leaves = [x, gates, *pool.parameters(), *([] if base is None else base.parameters())]
    expected = with_gradients(oracle(x, routing_of(k, gates), pool, base), leaves)
    assert expected[0].shape == kind.output_shape(x.shape)
    for name in (*available(x, plan(routing_of(k, gates)), pool), "auto"):
        shared = None if base is None else dict(base.named_parameters())
        y = dispatch(x, plan(routing_of(k, gates)), pool, name, always=shared)
        for found, wanted in zip(with_gradients(y, leaves), expected):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_backends_for_sorted_tokens_do_not_offer_themselves() -> None:
    pool, x = pool_of(Conv()), rand(BATCH, WIDTH, 4, 4)
    usable = available(x, plan(routing_of(1, torch.ones(BATCH, 1))), pool)
    assert set(usable) == {"loop", "dense", "sorted", "fold"} <= set(BACKENDS)


def test_the_affine_map_on_tokens_is_the_1x1_case() -> None:
    conv, affine = pool_of(Conv(kernel=1)), ExpertPool(Affine(), EXPERTS, WIDTH)
    affine.weight.data.copy_(conv.weight[..., 0, 0])
    affine.bias.data.copy_(conv.bias)
    x, todo = rand(BATCH, WIDTH, 5, 6), plan(routing_of(2, rand(BATCH, 2)))
    tokens = x.flatten(2).transpose(1, 2)
    expected = run_fold(tokens, todo, affine, False).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(run_fold(x, todo, conv, False), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    pool, x = pool_of(Conv()).to(dtype), rand(BATCH, WIDTH, 6, 6).to(dtype)
    todo = plan(routing_of(2, rand(BATCH, 2)))
    wide = dispatch(x.double(), todo, pool_of(Conv()).to(dtype).double(), "loop")
    found = dispatch(x, todo, pool)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wide, atol=0.2 if dtype != torch.float64 else 1e-6, rtol=0.05
    )


def test_small_additions_to_a_kernel_survive_autocast() -> None:
    """Mixed in float32, then rounded once: 1 + 3 * 2^-9 is not 1 in bfloat16 steps of 2^-7."""
    pool = ExpertPool(Conv(kernel=1, bias=False), 3, 1)
    pool.weight.data.fill_(2**-9)
    always = {"weight": torch.ones(1, 1, 1, 1)}
    gates = torch.ones(2, 3)
    todo = plan(
        dataclasses.replace(
            routing_of(3, gates, 2), num_experts=3, ids=torch.arange(3).expand(2, 3)
        )
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = dispatch(torch.ones(2, 1, 4, 4), todo, pool, "fold", always=always)
    assert torch.equal(y, torch.full_like(y, 1 + 2**-7))


def layer_of(experts: dict[str, Any], width: int = WIDTH, **router: Any) -> ExpertLayer:
    config = ExpertLayerConfig.from_dict(
        {"num_experts": EXPERTS, "experts": {"kind": "conv", **experts}, "router": router}
    )
    return config.build(width, time_width=8)


def context(batch: int = BATCH) -> Context:
    steps = torch.arange(batch) * 100
    return Context(
        batch=batch, tokens=0, noise=steps / 999, step_index=steps, time_embedding=rand(batch, 8)
    )


ROUTERS: dict[str, dict[str, Any]] = {
    "pooled, sigmoid, dense": {"unit": "sample", "probability": "sigmoid", "select": "dense"},
    "pooled, top 2 renormalised": {"unit": "sample", "weight": "renorm"},
    "noise level": {"score": "noise_level", "select": "dense"},
    "noise window": {
        "score": "noise_window",
        "probability": "identity",
        "select": {"kind": "top_k", "k": 1},
        "weight": "one",
    },
    "cosine": {"score": "cosine", "unit": "sample", "probability": "identity"},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_layer_routes_samples_by_any_router(router: dict[str, Any]) -> None:
    layer = layer_of({"out": 6, "stride": 2}, **router)
    x = rand(BATCH, WIDTH, 8, 10)
    answer = layer(x, context())
    (routing,) = answer.routings
    assert answer.y.shape == (BATCH, 6, 4, 5)
    assert (routing.unit, routing.batch, routing.probs.shape) == ("sample", (BATCH, 80), (BATCH, 4))
    torch.testing.assert_close(answer.y, oracle(x, routing, layer.pool, None), atol=1e-5, rtol=1e-5)
    row = torch.tensor([1])
    facts = {
        name: getattr(context(), name)[row] for name in ("noise", "step_index", "time_embedding")
    }
    alone = layer(x[row], context().replace(batch=1, **facts))
    torch.testing.assert_close(alone.y, answer.y[row], atol=1e-6, rtol=1e-5)


def test_the_router_sees_the_mean_over_the_grid() -> None:
    layer = layer_of({}, unit="sample", select="dense")
    x = rand(BATCH, WIDTH, 4, 6)
    (routing,) = layer(x, context()).routings
    torch.testing.assert_close(routing.inputs, x.mean(dim=(2, 3)))
    scrambled = x.flatten(2)[:, :, torch.randperm(24)].view_as(x)
    (same,) = layer(scrambled, context()).routings
    torch.testing.assert_close(same.probs, routing.probs)


def test_one_kernel_serves_a_batch_at_one_noise_level(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of({}, score="noise_level", select="dense")
    ctx = context().replace(time_embedding=rand(1, 8).expand(BATCH, 8))
    x, batches = rand(BATCH, WIDTH, 8, 8), []
    plain = torch.nn.functional.conv2d

    def counted(x: Tensor, *args: Any) -> Tensor:
        batches.append(x.shape[0])
        return plain(x, *args)

    monkeypatch.setattr("torch.nn.functional.conv2d", counted)
    expected = layer(x, ctx).y
    with torch.no_grad():
        torch.testing.assert_close(layer(x, ctx).y, expected, atol=1e-5, rtol=1e-5)
    assert batches == [1, BATCH], "one group per sample with gradients, one kernel without"


def test_experts_start_like_convolutions_and_leave_one_by_one() -> None:
    pool = ExpertPool(Conv(out=6, groups=2), EXPERTS, WIDTH)
    limit = (WIDTH // 2 * 9) ** -0.5
    assert 0.8 * limit < pool.weight.abs().max() <= limit and pool.bias.abs().max() == 0
    assert len({float(kernel.sum()) for kernel in pool.weight.detach()}) == EXPERTS
    modules, x = pool.unpack(), rand(2, WIDTH, 5, 5)
    own = dict(zip(("weight", "bias"), (pool.weight[2], pool.bias[2])))
    torch.testing.assert_close(modules[2](x), torch.conv2d(x, **own, padding=1, groups=2))
    other = ExpertPool(Conv(out=6, groups=2), EXPERTS, WIDTH)
    other.load_expert_state(0, pool.expert_state(3))
    assert torch.equal(other.weight[0], pool.weight[3])


def test_which_modules_are_one_expert_more() -> None:
    kind = Conv().like(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False))
    assert (kind.out, kind.size, kind.geometry, kind.bias) == (6, 3, (2, 1, 1, 1), False)
    assert kind.weights_of(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)) is not None
    assert kind.weights_of(nn.Conv2d(4, 6, 3, padding=1, bias=False)) is None
    assert kind.weights_of(nn.Linear(4, 6)) is None

    class Scaled(nn.Conv2d):
        pass

    assert kind.weights_of(Scaled(4, 6, 3, stride=2, padding=1, bias=False)) is None
    watched = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    watched.register_forward_hook(lambda *_: None)
    assert kind.weights_of(watched) is None


@pytest.mark.parametrize(
    ("conv", "fields", "message"),
    [
        (nn.Conv2d(4, 4, (3, 1)), {}, r"kernel: \(3, 1\) .*squares only"),
        (nn.Conv2d(4, 4, 3, padding="same"), {}, r"padding: 'same'"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), {}, r"padding_mode: 'circular'"),
        (nn.Conv2d(4, 4, 3), {"kernel": 1}, r"experts\.kernel: 1 .*null or 3"),
        (nn.Conv2d(4, 4, 3), {"bias": False}, r"experts\.bias: False .*null or True"),
    ],
)
def test_convolutions_that_cannot_have_experts(
    conv: nn.Conv2d, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Conv.from_dict(fields).like(conv)


SAMPLE = {"unit": "sample"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": {}}, r"router\.unit: 'token' .*'conv' serve a whole sample"),
        ({"router": SAMPLE, "rounds": 2}, r"rounds: 2 .*allowed: 1"),
        ({"router": SAMPLE, "answer": "output"}, r"answer: 'output' .*\"delta\""),
        ({"router": SAMPLE, "stem": "star"}, r"stem: 'star'"),
        ({"router": SAMPLE, "adaptor": 1.0}, r"adaptor: 1\.0 .*null"),
        ({"router": SAMPLE, "router_reads": "stream"}, r"router_reads: 'stream'"),
        ({"router": SAMPLE, "shared": {"hidden": 4}}, r"experts: 'conv' .*inner size"),
    ],
)
def test_layers_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertLayerConfig.from_dict({"experts": "conv", **fields})


def test_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.groups: 3 .*4 and 4 channels"):
        layer_of({"groups": 3}, unit="sample")


def test_temperature_falls_while_training() -> None:
    edit = {"kind": "temperature", "start": 30.0, "end": 2.0, "until": 0.5}
    layer = layer_of({}, unit="sample", select="dense", edits=[edit])
    x, logits = rand(BATCH, WIDTH, 4, 4), []
    for progress, training in ((0.0, True), (0.25, True), (0.9, True), (0.0, False)):
        ctx = context().replace(progress=progress, training=training)
        logits.append(layer(x, ctx).routings[0].logits)
    for found, temperature in zip(logits[:3], (30.0, 16.0, 2.0)):
        torch.testing.assert_close(found * temperature, logits[2] * 2.0)
    assert torch.equal(logits[2], logits[3])
