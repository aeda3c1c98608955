"""Fused experts answer what the chosen ones answer together: every kind, selection and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.cache.layer import FoldedLayer, check_foldable
from coterie.cache.schedule import Steps, at
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, ExpertLayerConfig

WIDTH, TIME, STEPS, TOKENS = 12, 8, 6, 5
SWIGLU, GELU = {"kind": "swiglu", "hidden": 8}, {"kind": "gelu_mlp", "hidden": 8}
TOP = {"score": {"kind": "noise_level", "init_std": 0.5}, "select": {"kind": "top_k", "k": 2}}
WINDOW = {
    "score": "noise_window",
    "probability": "identity",
    "select": {"kind": "top_k", "k": 1},
    "weight": "one",
}

LAYERS: dict[str, dict[str, Any]] = {
    "swiglu": {"experts": SWIGLU},
    "geglu": {"experts": {**SWIGLU, "activation": "gelu_tanh"}},
    "gelu_mlp": {"experts": GELU},
    "affine": {"experts": "affine"},
    "modulation": {"experts": "modulation", "stem": "star", "adaptor": 1.0},
    "modulation by vectors": {"experts": {"kind": "modulation", "form": "vector"}},
    "convolution": {"experts": "conv"},
    "convolution with stride and groups": {
        "experts": {"kind": "conv", "stride": 2, "groups": 2, "out": 6, "bias": False}
    },
    "channel window": {"num_experts": None, "experts": "channel_window", "router": WINDOW},
    "random channels": {
        "num_experts": None,
        "experts": {"kind": "channel_window", "mode": "random", "num_masks": 9},
        "router": WINDOW,
    },
    "fixed window": {"experts": SWIGLU, "router": WINDOW},
    "one expert": {"experts": GELU, "router": {**TOP, "select": {"kind": "top_k", "k": 1}}},
    "three experts": {"experts": GELU, "router": {**TOP, "select": {"kind": "top_k", "k": 3}}},
    "all experts": {"experts": SWIGLU, "router": {**TOP, "select": "dense", "weight": "renorm"}},
    "variable number": {
        "experts": SWIGLU,
        "router": {**TOP, "select": {"kind": "top_p", "p": 0.45}},
    },
    "drawn in training": {
        "experts": SWIGLU,
        "router": {**TOP, "select": {"kind": "random", "k": 2}, "weight": "renorm"},
    },
    "some closed": {
        "experts": SWIGLU,
        "router": {**TOP, "edits": [{"kind": "candidates", "allowed": [0, 2, 3]}]},
    },
    "shared": {"experts": SWIGLU, "shared": {"hidden": 6, "count": 2, "scale": 0.5}},
    "shared with a gate": {"experts": GELU, "shared": {"hidden": 6, "count": 2, "gate": "self"}},
    "shared beside a stem": {"experts": SWIGLU, "shared": {"hidden": 6}, "stem": "star"},
    "merged": {"experts": SWIGLU, "slot_map": [0, 1, 0, 1]},
    "rounds": {"experts": SWIGLU, "shared": {"hidden": 4}, "rounds": 2, "inner_norm": True},
    "rounds with one router": {"experts": GELU, "rounds": 2, "round_routing": "shared"},
    "rounds of one decision": {"experts": GELU, "rounds": 3, "round_routing": "frozen"},
    "tasks of noise levels": {
        "experts": SWIGLU,
        "noise_tasks": 2,
        "router": {**TOP, "edits": [{"kind": "candidates", "by_task": [[0, 1], [1, 2, 3]]}]},
    },
    "the stream replaced": {"experts": SWIGLU, "answer": "output"},
}


def build(dtype: torch.dtype = torch.float32, **fields: Any) -> ExpertLayer:
    torch.manual_seed(0)
    config = ExpertLayerConfig.from_dict({"num_experts": 4, "router": TOP, **fields})
    layer = config.build(WIDTH, TIME)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return layer.to(dtype).eval()


def context(steps: list[int], tokens: int = TOKENS) -> Context:
    at_steps = torch.tensor(steps) * 7
    wave = torch.sin(at_steps[:, None] * torch.linspace(0.05, 1.0, TIME))
    return Context(
        len(steps),
        tokens,
        noise=at_steps / 49,
        step_index=at_steps,
        num_steps=50,
        time_embedding=wave,
        label=torch.zeros(len(steps), dtype=torch.long),
        layer=3,
    )


def inputs(layer: ExpertLayer, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    grid = layer.config.kind.grid
    shape = (batch, WIDTH, 6, 6) if grid else (batch, TOKENS, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def fold(layer: ExpertLayer) -> FoldedLayer:
    every = list(range(STEPS))
    recorded = layer(inputs(layer, STEPS, layer_dtype(layer)), context(every)).routings
    return FoldedLayer(layer, recorded, "here")


def layer_dtype(layer: ExpertLayer) -> torch.dtype:
    return next((p.dtype for p in layer.parameters()), torch.float32)


def same_routing(one: Routing, other: Routing) -> bool:
    return (
        torch.equal(one.ids, other.ids)
        and torch.allclose(one.gates, other.gates, atol=1e-6)
        and torch.equal(one.counts(), other.counts())
        and (one.batch, one.layer, one.round) == (other.batch, other.layer, other.round)
    )


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_step_is_answered_as_without_a_cache(name: str) -> None:
    layer = build(**LAYERS[name])
    folded = fold(layer)
    h = inputs(layer, 3)
    for step in range(STEPS):
        ctx = context([step] * 3)
        expected = layer(h, ctx)
        with at(Steps((step,) * 3)):
            made = folded(h, ctx)
        torch.testing.assert_close(made.y, expected.y, atol=1e-5, rtol=1e-5)
        assert len(made.routings) == len(expected.routings) == layer.config.rounds
        assert all(same_routing(a, b) for a, b in zip(made.routings, expected.routings))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_sums_are_the_same_to_the_last_digits(name: str) -> None:
    layer = build(torch.float64, **LAYERS[name])
    every = list(range(STEPS))
    h = inputs(layer, STEPS, torch.float64)
    expected = layer(h, context(every))
    folded = FoldedLayer(layer, expected.routings, "here")
    with at(Steps(tuple(every))):
        made = folded(h, context(every))
    torch.testing.assert_close(made.y, expected.y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["swiglu", "convolution", "variable number", "rounds"])
@torch.no_grad()
def test_samples_at_different_steps_do_not_disturb_each_other(name: str) -> None:
    layer = build(**LAYERS[name])
    folded = fold(layer)
    steps = [4, 0, 4, 2, 0, 5, 4]
    h = inputs(layer, len(steps))
    expected = layer(h, context(steps))
    with at(Steps(tuple(steps))):
        made = folded(h, context(steps))
    torch.testing.assert_close(made.y, expected.y, atol=1e-5, rtol=1e-5)
    assert all(same_routing(a, b) for a, b in zip(made.routings, expected.routings))


def test_one_expert_with_all_the_weight_is_that_expert() -> None:
    """Gates (1, 0): the second expert's columns are zero."""
    layer = build(experts=SWIGLU)
    one, two = layer.pool.unbind()[:2]
    fused = layer.pool.kind.fuse([one, two], torch.tensor([1.0, 0.0]))
    assert torch.equal(fused["down"][:, :8], one["down"])
    assert not fused["down"][:, 8:].any()
    assert torch.equal(fused["gate_up"][:8], one["gate_up"][:8])  # gate rows of both come first
    assert torch.equal(fused["gate_up"][8:16], two["gate_up"][:8])


def test_fixed_windows_are_stored_once_per_window() -> None:
    """Six steps, weight one, top 1: as many experts as the window passes."""
    layer = build(experts=SWIGLU, router={**WINDOW, "score": {"kind": "noise_window"}})
    folded = fold(layer)
    windows = {tuple(ids) for ids in folded.get_buffer("ids0").tolist()}
    assert 1 < len(windows) < STEPS
    assert folded.num_tensors == 2 * len(windows)


def test_what_no_gate_enters_is_stored_once_per_choice() -> None:
    folded = fold(build(experts=SWIGLU, router={**TOP, "select": "dense"}))
    assert folded.num_tensors == 1 + STEPS  # all first layers are one, each second is its own


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router": {"score": "linear"}}, "score: 'linear' is not allowed"),
        ({"router": {"score": "linear", "unit": "sample"}}, "more than the noise level"),
        ({"router": {"score": {"kind": "fixed", "by": "label"}}}, "score: 'fixed'"),
        ({"router": {"score": {"kind": "fixed", "by": "row"}, "unit": "sample"}}, "score: 'fixed'"),
        ({"router": {**TOP, "partition": "null_label"}}, "partition: 'null_label'"),
        (
            {
                "router": {
                    **TOP,
                    "edits": [{"kind": "candidates", "by_task": [[0, 1], [2, 3]]}],
                }
            },
            "edits.0: 'candidates' is not allowed",
        ),
    ],
)
def test_routers_that_see_more_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    layer = build(experts=SWIGLU, **fields)
    with pytest.raises(ConfigError, match=r"trunk\.blocks\.1\.ffn: ") as error:
        check_foldable(layer, "trunk.blocks.1.ffn")
    assert reason in str(error.value)


def test_gates_that_read_what_the_experts_read_are_refused() -> None:
    fields = {"noise_tasks": 2, "self_gate": {"by_task": [[0], [1]]}}
    layer = build(experts=SWIGLU, router={**TOP, "select": "dense"}, **fields)
    with pytest.raises(ConfigError, match=r"here: self_gate: .* it reads what the experts read"):
        check_foldable(layer, "here")


def test_a_kind_that_cannot_be_fused_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="here: experts: 'norm_mlp' is not allowed"):
        fold(build(experts="norm_mlp"))


def test_a_folded_layer_needs_a_step() -> None:
    layer = build(experts=SWIGLU)
    with pytest.raises(ConfigError, match="inside a call of its denoiser only"):
        fold(layer)(inputs(layer, 1), context([0]))


@torch.no_grad()
def test_padding_is_masked_and_samples_of_padding_alone_are_refused() -> None:
    layer = build(experts=SWIGLU, shared={"hidden": 4})
    folded = fold(layer)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 2:] = False
    h = inputs(layer, 2)
    h[1, 2:] = float("nan")
    ctx = context([1, 1]).replace(token_mask=mask)
    expected = layer(h, ctx)
    with at(Steps((1, 1))):
        made = folded(h, ctx)
        torch.testing.assert_close(made.y, expected.y, atol=1e-5, rtol=1e-5)
        assert torch.equal(made.routings[0].rows_mask(), expected.routings[0].rows_mask())
        with pytest.raises(DataError, match="a sample without tokens"):
            folded(h, ctx.replace(token_mask=mask & torch.tensor([[True], [False]])))
