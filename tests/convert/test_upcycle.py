"""Dense networks become experts without a change of what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.convert import (
    UpcycleConfig,
    check_preserved,
    convert_block,
    upcycle,
    upcycled_config,
)
from coterie.convert.check import copy_load_cv
from coterie.convert.weights import cut, router_rows
from coterie.core.config import override
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.core.rng import generator
from coterie.experts import EXPERTS, ExpertLayer
from coterie.experts.dense import FEED_FORWARD
from small_models import images, small, woken, words

WIDTH, HIDDEN = 12, 24
KINDS = {"gelu": "gelu_mlp", "swiglu": "swiglu"}


def network(name: str, seed: int = 0, hidden: int = HIDDEN) -> nn.Module:
    """A dense network whose every parameter, biases too, is of the size of its weights."""
    module = FEED_FORWARD[name](WIDTH, hidden)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=rng)
    return module


def converted(
    name: str, config: UpcycleConfig, dense: nn.Module, dtype: torch.dtype = torch.float32
) -> ExpertLayer:
    layer = config.layer(EXPERTS.parse(KINDS[name]), HIDDEN).build(WIDTH).to(dtype)
    names = layer.pool.kind.plain_names()
    tensors = {key: dense.get_parameter(plain) for key, plain in names.items()}
    convert_block(layer, tensors, config, generator(config.seed))
    return layer.eval()


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, WIDTH, generator=rng, dtype=dtype)


def answer(layer: ExpertLayer, x: Tensor) -> tuple[Tensor, Any]:
    out = layer(x, Context(batch=x.shape[0], tokens=x.shape[1]))
    return out.y, out.routings[0]


SHAPES = [(1, 1, 1), (1, 4, 1), (2, 1, 1), (4, 1, 1), (3, 2, 1), (4, 3, 1), (4, 1, 2), (4, 2, 3)]


@pytest.mark.parametrize("gates", ["auto", "renorm", "straight_through"])
@pytest.mark.parametrize(("copies", "slices", "used"), SHAPES)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.filterwarnings("ignore:router. one expert per row")
def test_a_converted_layer_is_the_dense_network(
    name: str, copies: int, slices: int, used: int, gates: str
) -> None:
    config = UpcycleConfig(copies=copies, slices=slices, copies_used=used, gates=gates)
    dense = network(name)
    with torch.no_grad():
        x = rows(300)
        y, routing = answer(converted(name, config, dense), x)
        torch.testing.assert_close(y, dense(x), rtol=1e-6, atol=1e-5)
    assert routing.num_experts == copies * slices and routing.top_k == slices * used
    chosen = routing.one_hot().unflatten(1, (copies, slices)).sum(dim=2)
    assert (chosen.sort(dim=1).values[:, -used:] == slices).all(), "whole copies"


@pytest.mark.parametrize(("copies", "slices", "used"), [(4, 2, 1), (3, 3, 2), (4, 1, 1)])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_in_double_precision_only_rounding_is_left(
    name: str, copies: int, slices: int, used: int
) -> None:
    """Gates are float32, so those that are exactly 1 (or a power of two of it) are asked for."""
    config = UpcycleConfig(copies=copies, slices=slices, copies_used=used, gates="straight_through")
    dense = network(name).double()
    scale = config.router().scale * used  # float32 knows 1/2 exactly, 1/3 not
    assert scale == 1.0
    with torch.no_grad():
        x = rows(100, dtype=torch.float64)
        y, _ = answer(converted(name, config, dense, torch.float64), x)
        assert float((y - dense(x)).abs().max()) < (1e-12 if used == 1 else 1e-6)


def test_near_uniform_raw_gates_keep_the_function_to_their_scale() -> None:
    dense, x = network("gelu"), rows(300)
    errors = []
    for scale in (None, 1e-2):
        config = UpcycleConfig(copies=4, slices=2, gates="raw", router_scale=scale)
        with torch.no_grad():
            y, _ = answer(converted("gelu", config, dense), x)
            errors.append(float((y - dense(x)).abs().max() / dense(x).abs().max()))
    assert errors[0] < 1e-4
    assert errors[1] / errors[0] == pytest.approx(1e3, rel=0.2)


@given(
    slices=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    name=st.sampled_from(["gelu", "swiglu"]),
    seed=st.integers(0, 99),
)
def test_slices_add_up_and_keep_their_units(slices: int, name: str, seed: int) -> None:
    dense = network(name, seed).double()
    kind = EXPERTS.parse({"kind": KINDS[name], "hidden": HIDDEN // slices})
    whole = EXPERTS.parse({"kind": KINDS[name], "hidden": HIDDEN})
    tensors = {key: dense.get_parameter(plain) for key, plain in kind.plain_names().items()}
    pieces = cut(whole, tensors, slices)
    assert {key: tuple(piece.shape[1:]) for key, piece in pieces.items()} == kind.shapes(WIDTH)
    x = rows(5, seed, torch.float64)
    total = torch.zeros_like(x)
    for j in range(slices):
        part = kind.module(WIDTH).double()
        part.load_state_dict({kind.plain_names()[k]: piece[j] for k, piece in pieces.items()})
        total = total + part(x)
    torch.testing.assert_close(total, dense(x), rtol=1e-12, atol=1e-12)


def test_one_copy_in_one_slice_is_the_network_itself() -> None:
    config = UpcycleConfig(copies=1, slices=1)
    dense = network("gelu")
    layer = converted("gelu", config, dense)
    assert config.mode == "identity"
    assert torch.equal(layer.pool.stacks()["down_bias"][0], dense.get_parameter("down.bias"))
    x = rows(9)
    with torch.no_grad():
        torch.testing.assert_close(answer(layer, x)[0], dense(x))


def test_modes_are_named_by_what_is_done() -> None:
    modes = {(4, 1): "copy", (1, 2): "slice", (4, 2): "slice+copy", (1, 1): "identity"}
    for (copies, slices), mode in modes.items():
        assert UpcycleConfig(copies=copies, slices=slices).mode == mode


def test_experts_may_be_put_in_another_order_with_their_router_rows() -> None:
    config = UpcycleConfig(copies=3, slices=2)
    layer, x = converted("gelu", config, network("gelu")), rows(50)
    before, _ = answer(layer, x)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    with torch.no_grad():
        for stack in [*layer.pool.stacks().values(), layer.router(0).score.proj.weight]:
            stack.copy_(stack[order].clone())
    torch.testing.assert_close(answer(layer, x)[0], before, rtol=1e-5, atol=1e-5)


def test_unrepeated_rows_break_the_function() -> None:
    """Slices of different copies: one part of the network twice, another not at all."""
    config = UpcycleConfig(copies=3, slices=4, repeat_rows=False)
    assert not config.exact
    dense, x = network("gelu"), rows(500)
    with torch.no_grad():
        error = answer(converted("gelu", config, dense), x)[0] - dense(x)
        assert float(error.norm() / dense(x).norm()) > 0.2


@pytest.mark.parametrize(
    "config", [UpcycleConfig(), UpcycleConfig(slices=1)], ids=["slice", "copy"]
)
def test_one_training_step_tells_copies_and_slices_apart(config: UpcycleConfig) -> None:
    layer = converted("gelu", config, network("gelu")).train()
    target = rows(64, seed=5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    y, routing = answer(layer, rows(64))
    (y - target).square().mean().backward()
    weight = layer.router(0).score.proj.weight
    assert weight.grad is not None and (weight.grad.abs().sum(dim=1) > 0).all()
    optimizer.step()
    used = routing.counts() > 0
    per_copy = weight.unflatten(0, (config.copies, config.slices))[
        used.view(config.copies, -1)[:, 0]
    ]
    if config.slices > 1:
        assert ((per_copy[:, 0] - per_copy[:, 1]).abs().amax(dim=1) > 1e-7).all()
    stack = layer.pool.stacks()["up"].detach().unflatten(0, (config.copies, config.slices))
    first, second = used.view(config.copies, -1)[:, 0].nonzero().flatten()[:2].tolist()
    assert not torch.equal(stack[first], stack[second])


def test_noise_is_relative_to_each_tensor() -> None:
    quiet, loud = UpcycleConfig(), UpcycleConfig(noise=0.1)
    assert quiet.exact and not loud.exact
    dense = network("gelu")
    plain = converted("gelu", quiet, dense).pool.stacks()["up"]
    noisy = converted("gelu", loud, dense).pool.stacks()["up"]
    size = float(((noisy - plain).std() / plain.std()).detach())
    assert size == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(noisy[0], noisy[2]), "every copy has noise of its own"


def test_calibrated_rows_share_out_inputs_that_have_a_mean_and_a_direction() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.ones(32)
    spread[:2] = 6.0

    def draw(count: int) -> Tensor:
        return torch.randn(count, 32, generator=rng) * spread + 2.0

    seen, fresh = draw(2000), draw(4000)
    config = UpcycleConfig(copies=8, slices=2)
    found: dict[str, list[float]] = {"random": [], "balanced": []}
    for seed in range(8):
        for name, inputs in (("random", None), ("balanced", seen)):
            weight = router_rows(config, 32, generator(seed), inputs)
            logits = fresh @ weight.T
            load = torch.bincount(logits[:, ::2].argmax(dim=1), minlength=8).float()
            found[name].append(float(load.std(correction=0) / load.mean()))
            if name == "balanced":
                torch.testing.assert_close(logits.std(dim=0), torch.ones(16), rtol=0.1, atol=0.0)
    assert max(found["balanced"]) < 0.2 < sum(found["random"]) / 8


# Whole models


MODELS = {
    "image": ("dit", lambda: images(8)),
    "text": ("text:dense", lambda: words(4)),
    "ddpm": ("dense-ddpm", lambda: images(8)),
}
CASES = [(name, shape) for name in MODELS for shape in [(4, 1), (1, 2), (3, 2), (2, 4)]]


def inputs_of(model: Any, batch: Any) -> Any:
    t = torch.linspace(0.1, 0.9, len(batch.ids))
    return lambda dense: dense(batch.x, t, batch.cond)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_an_upcycled_model_is_the_dense_one(name: str, shape: tuple[int, int]) -> None:
    recipe, batch_of = MODELS[name]
    dense, batch = woken(small(recipe)), batch_of()
    config = UpcycleConfig(copies=shape[0], slices=shape[1])
    changed, model = upcycle(dense, config, inputs_of(dense, batch))
    found = check_preserved(dense, model, batch, config)
    assert found.holds and found.relative_error < 1e-5
    assert found.whole_copies == 1.0
    assert len(found.load_cv) == len(dense.backbone.trunk.blocks)
    assert type(changed).from_json(changed.to_json()) == changed == model.config
    assert not model.training and model.config.backbone.trunk.slots


def test_double_precision_models_agree_to_rounding() -> None:
    dense, batch = woken(small("dit")).double(), images(8)
    batch = type(batch)(batch.x.double(), batch.cond, batch.ids)
    config = UpcycleConfig(copies=3, slices=2)
    _, model = upcycle(dense, config)
    assert next(model.parameters()).dtype == torch.float64
    assert check_preserved(dense, model, batch, config).max_error < 1e-12


def test_only_the_named_blocks_change() -> None:
    dense = woken(small("dit"))
    config = UpcycleConfig(layers=(1,))
    _, model = upcycle(dense, config)
    own, old = model.state_dict(), dense.state_dict()
    place = "backbone.trunk.blocks.1.ffn."
    assert all(torch.equal(own[name], old[name]) for name in old if not name.startswith(place))
    assert {name for name in own if name not in old} == {n for n in own if n.startswith(place)}
    with pytest.raises(ConfigError, match=r"layers: 'all' .*\[0\]; block 1 holds experts already"):
        upcycled_config(model.config, UpcycleConfig())
    further = UpcycleConfig(layers=(0,), copies=2)
    _, both = upcycle(model, further)
    found = check_preserved(model, both, images(8), further)
    assert found.holds and len(found.load_cv) == 1


def test_parameters_follow_the_formula() -> None:
    """N networks, s - 1 more output biases per copy, a router of N s rows; active: one network."""
    for name in ("dit", "text:dense"):
        config = small(name).model
        trunk = config.backbone.trunk
        copies, slices, width, depth = 4, 2, trunk.width, trunk.depth
        before = count_parameters(config.build()).total
        after = count_parameters(
            upcycled_config(config, UpcycleConfig(copies=copies, slices=slices)).build()
        )
        biased = trunk.mlp == "gelu"
        dense = (2 if biased else 3) * width * trunk.hidden
        bias = (trunk.hidden + width) if biased else 0
        router = copies * slices * width
        more_bias = (slices - 1) * width if biased else 0
        assert after.total - before == depth * (
            (copies - 1) * (dense + bias) + copies * more_bias + router
        )
        assert after.active - before == depth * (more_bias + router)


def test_the_same_seed_gives_the_same_model() -> None:
    dense = woken(small("dit"))
    first, again, other = (
        upcycle(dense, UpcycleConfig(seed=seed))[1].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ and all(name.endswith("score.proj.weight") for name in differ)


def test_the_global_generator_is_left_alone() -> None:
    dense = woken(small("dit"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    upcycle(dense, UpcycleConfig())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"copies": 0}, r"copies: 0 is not allowed"),
        ({"slices": 0}, r"slices: 0 is not allowed"),
        ({"copies": 2, "copies_used": 3}, r"copies_used: 3 is not allowed; allowed: 1\.\.2"),
        ({"gates": "one"}, r"gates: 'one' is not allowed"),
    ],
)
def test_impossible_settings_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpcycleConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("dit", {"slices": 3}, r"slices: 3 .*a divisor of the inner size 256"),
        ("dit", {"layers": (7,)}, r"layers: \(7,\) .*dense blocks of \[0, 1\]; no such block"),
        ("dit", {"layers": ()}, r"layers: \(\) .*one or more of \[0, 1\]"),
        ("dit-moe", {}, r"layers: 'all' .*block 0 holds experts already"),
    ],
)
def test_models_that_do_not_fit_are_named(name: str, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycled_config(small(name).model, UpcycleConfig.from_dict(fields))


def test_load_variation_counts_copies() -> None:
    layer = converted("gelu", UpcycleConfig(copies=2, slices=2), network("gelu"))
    with torch.no_grad():
        layer.router(0).score.proj.weight.zero_()
    _, routing = answer(layer, rows(20))
    assert copy_load_cv(routing, 2) == 1.0, "all rows tie, and go to copy 0"


def test_a_layer_may_be_trained_further_from_its_configuration() -> None:
    config = override(small("dit"), {"model.backbone.trunk.depth": 1})
    changed = upcycled_config(config.model, UpcycleConfig(copies=2, slices=2))
    slot = changed.backbone.trunk.slots[0]
    assert slot.expert.router.select.k == 2 and slot.expert.router.scale == 2.0
    assert slot.expert.balance[0].kind == "switch"
    assert not UpcycleConfig(balance=0.0).layer(EXPERTS.parse("gelu_mlp"), 8).balance
