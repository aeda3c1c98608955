"""Models that have been compiled: what watches or changes them reaches them all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_hf_models import EXPERTS, make_model, tokens
from torch import Tensor

from coterie.convert import UpcycleConfig
from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.interop.transformers import find_moe_layers, selfcheck, tap
from coterie.interop.upcycled import aux_losses, tapped, upcycle_transformers

hf = pytest.importorskip("transformers")

DELTA = torch.linspace(-3, 3, EXPERTS)


def answer(call: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = call(tokens(), use_cache=False).logits
    return logits


def compiled(model: Any, how: str) -> Callable[..., Any]:
    """The model after one pass that compiled it, or the part of it that ``how`` names."""
    layers = model.model.layers
    call = model
    if how == "around":
        call = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "one block":
        layers[1].compile(backend="eager")
    else:
        layers[1] = torch.compile(layers[1], backend="eager")
    answer(call)
    return call


@pytest.fixture(autouse=True)
def forget() -> Any:
    """Graphs of other tests."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["around", "in place", "one block", "a block wrapped"])
def test_B3_hooks_reach_what_was_compiled(how: str) -> None:
    plain = make_model("mixtral")
    expected: list[Routing] = []
    with tap(plain, expected.append):
        before = answer(plain)
    with find_moe_layers(plain)[1].edit_logits(DELTA):
        edited = answer(plain)
    site = find_moe_layers(plain)[1]
    one = site.router_config().replace(select={"kind": "top_k", "k": 2})
    with site.reroute(one):
        rerouted = answer(plain)

    model = make_model("mixtral")
    call = compiled(model, how)
    site = find_moe_layers(model)[1]
    with site.edit_logits(DELTA):
        torch.testing.assert_close(answer(call), edited)
    with site.reroute(one):
        torch.testing.assert_close(answer(call), rerouted)
    for _ in range(2):  # what was traced with other hooks is not taken for these
        records: list[Routing] = []
        with tap(model, records.append):
            torch.testing.assert_close(answer(call), before)
        assert [record.layer for record in records] == [0, 1]
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(records, expected, strict=True))
    torch.testing.assert_close(answer(call), before)
    assert type(model) is type(plain) and type(site.block) is type(find_moe_layers(plain)[1].block)


def test_B3_the_compiled_model_itself_is_taken() -> None:
    model = make_model("mixtral")
    call: Any = torch.compile(model, backend="eager")
    answer(call)
    records: list[Routing] = []
    with tap(call, records.append):
        answer(call)
    assert len(records) == 2
    assert len(selfcheck(call)) == 2


def dense() -> Any:
    config = hf.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return upcycle_transformers(
        hf.LlamaForCausalLM(config).eval(), UpcycleConfig(copies=2, slices=2, calibration=0)
    )


def test_B3_an_upcycled_model_has_its_balance_loss() -> None:
    model = dense()
    call: Any = torch.compile(model, backend="eager")
    before = answer(call)
    with tapped(model) as routings:
        torch.testing.assert_close(answer(call), before)
    assert len(routings) == 2 and len(aux_losses(model, routings)) == 2


def test_B3_a_layer_that_runs_without_its_hooks_is_an_error() -> None:
    """A kernel in the place of the block's own code asks neither router nor experts."""
    model = make_model("mixtral")
    site = find_moe_layers(model)[1]
    site.block.forward = lambda hidden_states: hidden_states
    with (
        site.tap(lambda routing: None),
        pytest.raises(ConfigError, match=r"layers\.1\.mlp: ran without calling its router and exp"),
    ):
        answer(model)
    answer(model)


def test_B3_what_a_compiler_may_not_leave_is_refused_by_it() -> None:
    model = make_model("mixtral")
    call: Any = torch.compile(model, backend="eager", fullgraph=True)
    before = answer(call)
    with tap(model, lambda routing: None), pytest.raises(RuntimeError, match=r"compiler\.disable"):
        answer(call)
    assert torch.equal(answer(call), before)
