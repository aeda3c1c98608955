"""Padding is never counted, however a model is told of it; by the bridge and in upcycled models."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_hf_models import make_model, tokens
from torch import Tensor

from coterie.convert import UpcycleConfig
from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.interop.transformers import tap
from coterie.interop.upcycled import aux_losses, tapped, upcycle_transformers

hf = pytest.importorskip("transformers")

LENGTH = 12
SIDES = {"left": [(5, 12), (0, 12), (2, 12)], "right": [(0, 7), (0, 12), (0, 10)]}
"""First token and the one after the last of each sample."""


@cache
def dense(family: str = "Llama") -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = getattr(hf, f"{family}ForCausalLM")(
        getattr(hf, f"{family}Config")(
            **sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = UpcycleConfig(copies=3, slices=2, calibration=0)
    return upcycle_transformers(model, config)


def mask_of(side: str) -> Tensor:
    places = torch.arange(LENGTH)
    return torch.stack([(places >= a) & (places < b) for a, b in SIDES[side]])


def four(mask: Tensor, form: str, total: int = LENGTH) -> Tensor:
    """[B, 1, N, S] as attention takes it; ``total``: places of a cache of fixed size."""
    n = mask.shape[1]
    causal = torch.arange(total)[None, :] <= torch.arange(n)[:, None]
    keys = torch.nn.functional.pad(mask, (0, total - n))
    open_ = causal[None, None] & keys[:, None, None]
    if form == "freed":  # rows that may read nothing read everything
        open_ = open_ | ~open_.any(-1, keepdim=True)
    if form == "float":
        return torch.zeros(open_.shape).masked_fill(~open_, torch.finfo(torch.float32).min)
    return open_


def seen_by_bridge(mask: Any, **given: Any) -> list[Routing]:
    model, records = make_model("qwen2_moe"), list[Routing]()
    with tap(model, records.append), torch.no_grad():
        model(tokens(3, LENGTH), attention_mask=mask, **given)
    return records


def seen_upcycled(mask: Any, **given: Any) -> list[Routing]:
    with tapped(dense()) as records, torch.no_grad():
        dense()(tokens(3, LENGTH), attention_mask=mask, **given)
    return records


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("seen", [seen_by_bridge, seen_upcycled])
def test_C2_masks_of_two_and_four_dimensions_name_the_same_rows(seen: Any, side: str) -> None:
    mask = mask_of(side)
    forms = [mask, mask.long(), *(four(mask, form) for form in ("bool", "float", "freed"))]
    for form in (*forms, {"full_attention": four(mask, "bool")}):
        if isinstance(form, dict) and seen is seen_upcycled:
            continue  # a model with one kind of attention takes no mask for several
        if not isinstance(form, dict) and form.dtype == torch.bool and form.dim() == 2:
            form = form.long()
        records = seen(form)
        assert len(records) == 2
        for record in records:
            assert record.mask is not None and torch.equal(record.mask, mask.reshape(-1))
            assert record.counts().sum() == mask.sum() * record.top_k
    full = four(torch.ones_like(mask), "bool")
    assert all(bool(record.rows_mask().all()) for record in seen(full))
    assert all(record.mask is None for record in seen(None))


@pytest.mark.parametrize("side", SIDES)
def test_C2_balance_losses_are_those_of_the_real_tokens(side: str) -> None:
    """Equal to the loss of routings from which the rows of padding are cut by hand."""
    model, mask = dense(), mask_of(side)
    with tapped(model) as routings, torch.no_grad():
        model(tokens(3, LENGTH), attention_mask=mask.long())
    rows = mask.reshape(-1)
    cut = [
        record.replace(
            ids=record.ids[rows], gates=record.gates[rows], probs=record.probs[rows],
            logits=record.logits[rows], batch=(1, int(rows.sum())), mask=None,
        )
        for record in routings
    ]  # fmt: skip
    losses = [float(item.value) for item in aux_losses(model, routings)]
    expected = [float(item.value) for item in aux_losses(model, cut)]
    assert len(losses) == 2 and losses == pytest.approx(expected, rel=1e-5)
    whole = [
        float(item.value) for item in aux_losses(model, [r.replace(mask=None) for r in routings])
    ]
    assert whole != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seen", [seen_by_bridge, seen_upcycled])
def test_C2_a_mask_longer_than_the_text_belongs_to_a_cache(seen: Any) -> None:
    """With empty places at its end for a cache of fixed size, and with the tokens seen before."""
    mask = mask_of("left")
    model = dense() if seen is seen_upcycled else make_model("qwen2_moe")
    config = model.config
    for total in (LENGTH, 20):
        cache = hf.StaticCache(config=config, max_cache_len=20)
        long = torch.nn.functional.pad(mask, (0, total - LENGTH), value=True).long()
        for given in (long, four(mask, "bool", 20), four(mask, "freed", 20)):
            cache.reset()
            for record in seen(given, past_key_values=cache, use_cache=True):
                assert record.mask is not None and torch.equal(record.mask, mask.reshape(-1))
    cache = hf.DynamicCache(config=config)
    first, rest = mask[:, :8], mask
    ids = tokens(3, LENGTH)
    found: list[Tensor] = []
    taps = tapped(model) if seen is seen_upcycled else tap(model, lambda r: found.append(r.mask))
    with taps as records, torch.no_grad():
        model(ids[:, :8], attention_mask=first.long(), past_key_values=cache, use_cache=True)
        model(ids[:, 8:], attention_mask=rest.long(), past_key_values=cache, use_cache=True)
    masks = [record.mask for record in records] if seen is seen_upcycled else found
    for got, part in zip(masks, (first, first, mask[:, 8:], mask[:, 8:]), strict=True):
        assert torch.equal(got, part.reshape(-1))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_C2_a_text_that_is_written_counts_no_padding(cache: str) -> None:
    model, mask = dense(), mask_of("left")
    with tapped(model) as records, torch.no_grad():
        model.generate(
            tokens(3, LENGTH), attention_mask=mask.long(), max_new_tokens=4, min_new_tokens=4,
            do_sample=False, cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
    counted = [int(record.rows_mask().sum()) for record in records if record.layer == 0]
    assert counted == [int(mask.sum()), 3, 3, 3]


def test_C2_routers_are_balanced_on_real_tokens() -> None:
    """Padding that the mask names changes no row of a router."""
    found = []
    for pad in (0, 7):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )).eval()  # fmt: skip
        mask = mask_of("right")
        ids = torch.where(mask, tokens(3, LENGTH), pad)
        config = UpcycleConfig(copies=2, slices=1)
        upcycle_transformers(model, config, lambda m: m(ids, attention_mask=mask.long()))  # noqa: B023
        found.append(model.model.layers[0].mlp.layer.router(0).score.proj.weight)
    assert torch.equal(*found)


def test_C2_a_mask_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention_mask: \(3, 7\) .*covers 3 samples of 12 tok"):
        seen_by_bridge(mask_of("left")[:, :7].long())
    with pytest.raises(ConfigError, match=r"attention_mask: 'str' is not allowed; allowed: a tens"):
        seen_upcycled("full")
