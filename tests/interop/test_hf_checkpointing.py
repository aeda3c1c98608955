"""Gradient checkpointing of Hugging Face models: layers run twice, and are seen and drawn once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_hf_models import make_model, tokens
from torch import Tensor

from coterie.convert import UpcycleConfig
from coterie.core.errors import DataError
from coterie.core.routing import Routing
from coterie.interop.transformers import find_moe_layers, tap
from coterie.interop.upcycled import aux_losses, tapped, upcycle_transformers

pytest.importorskip("transformers")


def gradients(model: Any, reentrant: bool | None) -> dict[str, Tensor]:
    """None: without checkpointing."""
    model.train().zero_grad()
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens()
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_C3_drawn_choices_are_the_same_when_a_layer_runs_again(reentrant: bool) -> None:
    model = make_model("qwen3_moe")
    site = find_moe_layers(model)[0]
    edits = [{"kind": "jitter", "scale": 1.0}]
    rule = site.router_config().replace(edits=edits, select={"kind": "random", "k": 3})
    found = []
    for mode in (None, reentrant):
        records: list[Routing] = []
        rng = torch.Generator().manual_seed(3)
        with site.reroute(rule, rng=rng), tap(model, records.append):
            found.append(gradients(model, mode))
        assert len(records) == len(find_moe_layers(model)), "one record per layer and pass"
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def upcycled() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    return upcycle_transformers(model, UpcycleConfig(balance=1.0))


def test_C3_upcycled_layers_are_recorded_once_and_keep_their_graph() -> None:
    model = upcycled()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with tapped(model) as routings:
        loss = model(tokens(), labels=tokens()).loss
        aux = sum(one.weight * one.value for one in aux_losses(model, routings))
        (loss + aux).backward()
    assert len(routings) == 2 and aux.requires_grad
    with pytest.raises(DataError, match=r"routing of slot ffn, layer 0: 'foreign'"):
        aux_losses(upcycled(), routings)


def test_C3_reentrant_checkpointing_leaves_no_graph_and_says_so() -> None:
    model = upcycled().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with tapped(model) as routings:
        model(tokens(), labels=tokens()).loss.backward()
    assert len(routings) == 2
    with pytest.raises(DataError, match=r"'no graph' .*use_reentrant=False"):
        aux_losses(model, routings)
