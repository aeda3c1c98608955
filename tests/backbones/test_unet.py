"""The U-Net and experts beside its convolutions: nothing changes at first, then everything may."""

from __future__ import annotations

import copy
import sys
import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones.hosting import ExpertSlot, places
from coterie.backbones.scope import current, scope
from coterie.backbones.unet import UNet, UNetConfig
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition

SIZES: dict[str, Any] = {"image_size": 8, "num_classes": 3, "widths": (8, 16), "groups": 4}
DENSE = {"unit": "sample", "select": "dense"}
ROUTERS: dict[str, dict[str, Any]] = {
    "dense softmax": DENSE,
    "dense sigmoid": {**DENSE, "probability": "sigmoid"},
    "one expert, raw gate": {"unit": "sample", "select": {"kind": "top_k", "k": 1}},
    "noise level": {"score": "noise_level"},
    "cosine": {"score": "cosine", "unit": "sample", "probability": "identity"},
    "own expert without label": {**DENSE, "partition": "null_label"},
    "recurrent": {**DENSE, "score": {"kind": "recurrent", "state": 5}},
    "hot first": {**DENSE, "edits": [{"kind": "temperature", "start": 30.0}]},
}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


def slot(names: str | list[str] = "*.conv2", router: dict[str, Any] = DENSE, **fields: Any) -> dict:
    expert = {"num_experts": 3, "experts": "conv", "router": router, **fields.pop("expert", {})}
    wanted = [names] if isinstance(names, str) else names
    return {"slot": "conv", "names": wanted, "expert": expert, **fields}


def unet(*slots: dict[str, Any], **changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNetConfig.from_dict({**SIZES, "slots": slots, **changes}).build()


def wake(model: nn.Module, only: str = "", std: float = 0.1) -> Any:
    """Every parameter moved, as after some training."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=rng))
    return model


@cache
def plain_and_weights() -> tuple[Any, dict[str, Tensor]]:
    plain = wake(unet())
    return plain, plain.network.state_dict()


def with_weights(model: UNet) -> UNet:
    """The slotted network with the dense network's weights in its own modules."""
    _, weights = plain_and_weights()
    own = model.network.state_dict()
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        inside = f"{path}.experts.shared.{last}"
        own[inside if inside in own else name].copy_(value)
    return model


def inputs(batch: int = 4, seed: int = 0) -> tuple[Tensor, Context, Condition]:
    rng = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 1, 8, 8, generator=rng), torch.rand(batch, generator=rng)
    label = torch.tensor([0, -1, 2, 1])[:batch]
    steps = (t * 999).long()
    ctx = Context(
        batch=batch,
        tokens=0,
        noise=t,
        step_index=steps,
        time_input=1000 * t,
        time_inputs=torch.arange(1000.0),
        training=True,
    )
    return x, ctx, Condition(label=label)


def test_it_is_the_network_of_the_other_library() -> None:
    model, (x, ctx, cond) = plain_and_weights()[0], inputs()
    seen: list[Any] = []
    model.network.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    answer = model(x, ctx, cond)
    assert answer.sample.shape == x.shape and answer.routings == ()
    assert all(torch.equal(given, ctx.time_input) for given in seen) and seen
    direct = model.network(x, ctx.time_input, class_labels=cond.label).sample
    assert torch.equal(answer.sample, direct)
    model.network.time_proj._forward_pre_hooks.clear()


def test_the_answer_starts_at_zero_and_depends_on_time_and_label() -> None:
    x, ctx, cond = inputs()
    assert not unet()(x, ctx, cond).sample.any()
    model = plain_and_weights()[0]
    base = model(x, ctx, cond).sample
    later = model(x, ctx.replace(time_input=ctx.time_input + 50), cond).sample
    other = model(x, ctx, Condition(label=torch.tensor([0, 0, 2, 1]))).sample
    assert not torch.allclose(base, later, atol=1e-4)
    assert torch.equal(base[[0, 2, 3]], other[[0, 2, 3]])
    assert not torch.allclose(base[1], other[1], atol=1e-4)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_experts_change_nothing_at_first_whatever_the_router(router: dict[str, Any]) -> None:
    x, ctx, cond = inputs()
    plain, _ = plain_and_weights()
    model = with_weights(unet(slot(router=router)))
    answer = model(x, ctx, cond)
    assert len(answer.routings) == 8
    torch.testing.assert_close(answer.sample, plain(x, ctx, cond).sample, atol=1e-6, rtol=1e-5)


def test_every_convolution_may_have_experts() -> None:
    model = with_weights(unet(slot("*")))
    answer = model(*inputs())
    assert len(answer.routings) == len(places(unet().network, "conv")) == 25
    expected = plain_and_weights()[0](*inputs()).sample
    torch.testing.assert_close(answer.sample, expected, atol=1e-6, rtol=1e-5)


def test_at_one_noise_level_not_even_a_bit_changes() -> None:
    x, ctx, cond = inputs()
    ctx = ctx.replace(time_input=torch.full((4,), 400.0))
    plain, _ = plain_and_weights()
    model = with_weights(unet(slot(router={"score": "noise_level"})))
    with torch.no_grad():
        assert torch.equal(model(x, ctx, cond).sample, plain(x, ctx, cond).sample)


def test_experts_then_router_learn() -> None:
    """The router weighs zeros in the first step; from the second on it gets a gradient."""
    model = with_weights(unet(slot("*.conv1")))
    (x, ctx, cond), target = inputs(), torch.randn(4, 1, 8, 8)
    found = []
    for _ in range(2):
        model.zero_grad()
        (model(x, ctx, cond).sample - target).square().mean().backward()
        parameters = dict(model.named_parameters())
        found.append({name: p.grad.abs().max() for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.1 * parameter.grad
    kernels, routers = ([n for n in found[0] if part in n] for part in (".pool.", ".routers."))
    assert len(kernels) == 16 and len(routers) == 8
    assert all(found[0][name] > 0 for name in kernels)
    assert all(found[0][name] == 0 for name in routers)
    assert all(value > 0 for name, value in found[1].items() if name in (*kernels, *routers))


def test_mixed_kernels_equal_the_loop_through_the_whole_network() -> None:
    x, ctx, cond = inputs()
    found = []
    for backend in ("auto", "loop"):
        model = wake(with_weights(unet(slot("*", expert={"dispatch": backend}))), "pool")
        y = model(x, ctx, cond).sample
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    assert found[0][0].abs().max() > 0.1
    for mixed, loop in zip(*found):
        torch.testing.assert_close(mixed, loop, atol=1e-4, rtol=1e-4)


def test_places_are_named_and_numbered_in_passing_order() -> None:
    network = unet().network
    names = [place.name for place in places(network, "conv")]
    assert names[:3] == ["conv_in", "down.0.0.conv1", "down.0.0.conv2"]
    middle = names.index("mid.0.conv1")
    assert names.index("down.1.0.conv2") < middle < names.index("up.0.0.conv1")
    assert names[-1] == "conv_out" and len(set(names)) == len(names)
    model = unet(slot("up_blocks.*.conv2"), slot(["mid_block.*.conv1", "down_blocks.0.*.conv?"]))
    told = [(r.slot, r.layer, r.name) for r in model(*inputs()).routings]
    assert told == [
        ("conv", 0, "down.0.0.conv1"),
        ("conv", 1, "down.0.0.conv2"),
        *[("conv", 2 + i, f"mid.{i}.conv1") for i in range(2)],
        *[("conv", 4 + 2 * i + j, f"up.{i}.{j}.conv2") for i in range(2) for j in range(2)],
    ]


def test_every_other_named_place() -> None:
    model = unet(slot("*.conv2", layers="odd"))
    assert [item.name for item in model.slots()] == [
        "down.1.0.conv2",
        "mid.1.conv2",
        "up.0.1.conv2",
        "up.1.1.conv2",
    ]


def test_places_of_equal_shape_may_share_a_pool() -> None:
    names = ["mid_block.resnets.*.conv1", "mid_block.resnets.*.conv2"]
    model = with_weights(unet(slot(names, reuse=2)))
    x, ctx, cond = inputs()
    plain, _ = plain_and_weights()
    answer = model(x, ctx, cond)
    torch.testing.assert_close(answer.sample, plain(x, ctx, cond).sample, atol=1e-6, rtol=1e-5)
    assert [r.pool_layers for r in answer.routings] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [pool.num_experts for pool in model.pools] == [6, 6]
    with pytest.raises(ConfigError, match=r"reuse: 2 .*down\.0\.0\.conv2 and down\.1\.0\.conv1"):
        unet(slot(["down_blocks.0.*.conv2", "down_blocks.1.*.conv1"], reuse=2))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    model = wake(with_weights(unet(slot())), "experts")
    x, ctx, cond = inputs()
    whole = model(x, ctx, cond).sample
    row = torch.tensor([2])
    own = ctx.replace(
        batch=1,
        noise=ctx.noise[row],
        step_index=ctx.step_index[row],
        time_input=ctx.time_input[row],
    )
    torch.testing.assert_close(
        model(x[row], own, cond.index(row)).sample, whole[row], atol=1e-5, rtol=1e-4
    )


BALANCE = [{"kind": "switch", "weight": 0.5}, {"kind": "selection_bias", "rate": 0.25}]


def test_balance_reads_the_routings_of_its_own_slot() -> None:
    router = {"unit": "sample", "select": {"kind": "top_k", "k": 1}, "selection_bias": True}
    model = unet(slot("mid_block.*", router, expert={"balance": BALANCE}), slot("up_blocks.*"))
    routings = model(*inputs()).routings
    own = [r.layer for r in routings if r.name.startswith("mid")]
    assert [(a.name, a.layer, a.weight) for a in model.aux_losses(routings)] == [
        ("switch", layer, 0.5) for layer in own
    ]
    model.after_step(routings)
    for routing in routings[: len(own)]:
        load = routing.counts()
        bias = model.expert_layer("conv", routing.layer).router(0).selection_bias
        assert torch.equal(bias, 0.25 * torch.sign(load.mean() - load))


def test_a_copy_is_independent() -> None:
    model = with_weights(unet(slot()))
    x, ctx, cond = inputs()
    before = model(x, ctx, cond).sample
    other = wake(copy.deepcopy(model))
    other.after_step(other(x, ctx, cond).routings)
    assert torch.equal(model(x, ctx, cond).sample, before)
    assert not torch.allclose(other(x, ctx, cond).sample, before)


def test_contexts_of_two_threads_do_not_mix() -> None:
    model = wake(
        with_weights(unet(slot("*in*", {"score": "noise_window", "probability": "identity"})))
    )
    results: dict[int, Any] = {}
    together = threading.Barrier(2)
    first = next(item for item in model.slots() if item.name == "conv_in")
    handle = first.register_forward_pre_hook(lambda *_: (together.wait(20), None)[1])

    def run(seed: int) -> None:
        x, ctx, cond = inputs(seed=seed)
        results[seed] = model(x, ctx, cond)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    handle.remove()
    for seed in (1, 2):
        alone = model(*inputs(seed=seed))
        assert torch.equal(results[seed].sample, alone.sample)
        assert len(results[seed].routings) == len(alone.routings)
        for one, two in zip(results[seed].routings, alone.routings):
            assert torch.equal(one.ids, two.ids) and torch.equal(one.noise, two.noise)


def test_nothing_is_left_of_a_call() -> None:
    model, (x, ctx, cond) = unet(slot("conv_in")), inputs()
    (only,) = model.slots()
    model(x, ctx, cond)
    assert current() is None
    with pytest.raises(DataError, match=r"expert slot conv_in: no context; .*gradient checkpoint"):
        only(x)
    with pytest.raises(DataError), scope(ctx):
        only(x[:, :, 0])
    assert current() is None
    with pytest.raises(DataError, match=r"conv_in: \(2, 1, 8, 8\) .*4 rows"), scope(ctx):
        only(x[:2])
    with scope(ctx) as outer, scope(ctx) as inner:
        only(x)
    assert (len(outer.routings), len(inner.routings)) == (0, 1) and current() is None


def test_learned_variance_and_no_classes() -> None:
    model = wake(unet(slot("conv_out"), learned_variance=True, num_classes=0))
    x, ctx, _ = inputs()
    answer = model(x, ctx, Condition())
    assert answer.sample.shape == answer.variance.shape == x.shape
    assert not torch.allclose(answer.sample, answer.variance)


def test_attention_where_it_is_wanted() -> None:
    names = [type(module).__name__ for module in unet(attention=(0,)).network.modules()]
    assert names.count("Attention") == 1 + 1 + 2
    assert [type(m).__name__ for m in unet().network.modules()].count("Attention") == 1


def test_data_that_do_not_fit() -> None:
    model, (x, ctx, cond) = unet(), inputs()
    with pytest.raises(DataError, match=r"x: \(4, 1, 8, 6\)"):
        model(x[..., :6], ctx, cond)
    with pytest.raises(DataError, match=r"label: 3 .*0\.\.2, or -1"):
        model(x, ctx, Condition(label=torch.tensor([0, 3, 1, 1])))
    with pytest.raises(DataError, match=r"cond\.label: None"):
        model(x, ctx, Condition())


TOKENS = {"slot": "ffn", "names": ["*"], "expert": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30, "widths": (8, 8, 8)}, r"image_size: 30 .*multiple of 4; 3 levels"),
        ({"widths": (8, 18)}, r"widths\.1: 18 .*multiples of groups = 4"),
        ({"widths": (8, 12)}, r"head_width: 8 .*divisor of widths\.1 = 12"),
        ({"attention": (2,)}, r"attention: 2 .*0\.\.1"),
        ({"widths": ()}, r"widths"),
        ({"slots": [TOKENS]}, r"slots\.0\.slot: 'ffn' .*conv; a U-Net"),
        ({"slots": [slot([])]}, r"slots\.0\.names: \(\)"),
        ({"slots": [slot(router={})]}, r"slots\.0\.expert\.router\.unit: 'token' .*whole sample"),
        ({"slots": [slot(expert={"experts": "swiglu"})]}, r"slots\.0\.expert\.experts: 'swiglu'"),
        ({"slots": [slot(expert={"rounds": 2})]}, r"slots\.0\.expert\.rounds: 2"),
    ],
)
def test_networks_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict({**SIZES, **changes})


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([slot("mid.*")], r"names: 'mid\.\*' .*allowed: conv_in, down_blocks\.0.* and 19 more"),
        ([slot("conv_in"), slot("conv_*")], r"names: 'conv_in' .*one expert system per place"),
        ([slot("conv_*", layers=[2])], r"layers: 2 .*0\.\.1, what is named"),
        (
            [slot("conv_in", expert={"experts": {"kind": "conv", "kernel": 1}})],
            r"conv_in: .*kernel",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused_while_building(slots: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unet(*slots)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"unet needs diffusers .*coterie\[interop\]"):
        UNetConfig().build()


def test_shapes_alone_are_enough_to_count() -> None:
    with torch.device("meta"):
        model = UNetConfig.from_dict({**SIZES, "slots": [slot()]}).build()
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in unet(slot()).parameters()
    )


def test_a_slot_holds_the_networks_own_convolution() -> None:
    model = with_weights(unet(slot("mid_block.resnets.0.conv1")))
    item = model.network.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(item, ExpertSlot) and type(item.experts.shared) is nn.Conv2d
    assert torch.equal(
        item.experts.shared.weight, plain_and_weights()[1]["mid_block.resnets.0.conv1.weight"]
    )
    assert not item.experts.pool.weight.any() and item.experts.pool.weight.shape == (
        3,
        16,
        16,
        3,
        3,
    )
