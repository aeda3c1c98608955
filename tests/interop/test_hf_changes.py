"""Changed routing and replaced experts in Hugging Face models, against written-out answers."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hand_layers import answer, best, gates_of, logits_of, row_gates, softmax
from hf_runs import experts_seen, logits_after, using
from tiny_hf_models import EXPERTS, KINDS, WIDTH, make_model, tokens
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.interop.transformers import find_moe_layers, tap

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MINUS = float("-inf")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_by_zero_changes_no_bit(model_of, kind: str, implementation: str) -> None:
    model = model_of(kind)
    with using(model, implementation):
        before = logits_after(model)
        with ExitStack() as stack:
            for site in find_moe_layers(model):
                stack.enter_context(site.edit_logits(torch.zeros(EXPERTS)))
            during = logits_after(model)
        assert torch.equal(before, during)
        assert torch.equal(before, logits_after(model))


def test_an_edit_by_zero_changes_no_bit_among_ties() -> None:
    """In 16 bits many logits are equal, and which of them is chosen is theirs to say."""
    pytest.importorskip("transformers")
    model = make_model("qwen3_moe", num_experts=32, moe_intermediate_size=16).to(torch.bfloat16)
    site = find_moe_layers(model)[0]
    with torch.no_grad():
        site.router.weight.copy_(site.router.weight[:1] + 0.01 * site.router.weight)
    records: list[Routing] = []
    before = logits_after(model)
    with site.tap(records.append), site.edit_logits(lambda logits: logits):
        assert torch.equal(before, logits_after(model))
    probs = records[0].probs.sort(dim=1, descending=True).values
    assert (probs[:, 2] == probs[:, 3]).any(), "the case needs ties at the border"


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_expert_is_never_chosen(model_of, kind: str) -> None:
    """-inf: the rest is chosen and weighted as if the expert were not there."""
    model = model_of(kind)
    site = find_moe_layers(model)[-1]

    def close(logits: Tensor) -> Tensor:
        logits[:, [0, 3]] = MINUS  # an edit may write into what it is given
        return logits

    records: list[Routing] = []
    with site.edit_logits(close), site.tap(records.append):
        seen, logits, router = experts_seen(site)
    logits[:, [0, 3]] = MINUS
    gates = gates_of(kind, router, logits)
    assert records[0].ids.tolist() == [[*row, *[EXPERTS] * (3 - len(row))] for row in gates]
    assert not ((records[0].ids == 0) | (records[0].ids == 3)).any()
    expected = answer(kind, site.experts, seen["h"], gates)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_too_few_open_experts_leave_the_rest_to_nobody(model_of, implementation: str) -> None:
    model = model_of("mixtral")
    site = find_moe_layers(model)[0]
    mask = torch.full((EXPERTS,), MINUS)
    mask[[1, 4]] = 0.0
    records: list[Routing] = []
    flagged = site.experts._is_expert_parallel
    with using(model, implementation), site.edit_logits(mask), site.tap(records.append):
        seen, logits, _ = experts_seen(site)
    assert (records[0].ids[:, 2] == EXPERTS).all() and (records[0].gates[:, 2] == 0).all()
    gates = [
        dict(zip(ids, softmax([row[e] for e in ids])))
        for row in logits.tolist()
        for ids in [best(row, 2, [1, 4])]
    ]
    expected = answer("mixtral", site.experts, seen["h"], gates)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)
    assert site.experts._is_expert_parallel == flagged


@pytest.mark.filterwarnings("ignore:router. one expert per row")
@pytest.mark.parametrize("k", [1, 5, EXPERTS])
@pytest.mark.parametrize("kind", KINDS)
def test_another_k_at_run_time(model_of, kind: str, k: int) -> None:
    site = find_moe_layers(model_of(kind))[-1]
    config = site.router_config().replace(select={"kind": "top_k", "k": k})
    with site.reroute(config):
        seen, logits, router = experts_seen(site)
    if kind.startswith("deepseek"):  # all groups open, so that k may exceed what they hold
        gates = [open_groups(kind, router, row, k) for row in logits.tolist()]
    else:
        gates = [row_gates(kind, router, row, k) for row in logits.tolist()]
    assert all(len(row) == k for row in gates)
    expected = answer(kind, site.experts, seen["h"], gates)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=2e-5)


def open_groups(kind: str, router: Any, logits: list[float], k: int) -> dict[int, float]:
    if kind == "deepseek_v2":
        probs = softmax(logits)
        return {e: 1.5 * probs[e] for e in best(probs, k)}
    scores = torch.tensor(logits).sigmoid()
    chosen = best((scores + router.e_score_correction_bias).tolist(), k)
    return {e: 1.5 * float(scores[e] / scores[chosen].sum()) for e in chosen}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_top_p_equals_a_naive_loop(model_of, implementation: str) -> None:
    """Rows use different numbers of experts; the places left over hold nobody, with weight 0."""
    model = model_of("olmoe")
    site = find_moe_layers(model)[0]
    config = site.router_config().replace(select={"kind": "top_p", "p": 0.8})
    records: list[Routing] = []
    with using(model, implementation), site.reroute(config), site.tap(records.append):
        seen, logits, _ = experts_seen(site)
    gates = []
    for row in logits.tolist():
        probs, chosen, total = softmax(row), list[int](), 0.0
        for e in best(probs, EXPERTS):
            chosen.append(e)
            total += probs[e]
            if total > 0.8:
                break
        gates.append({e: probs[e] for e in chosen})
    used = [len(row) for row in gates]
    assert len(set(used)) > 1
    assert records[0].valid.sum(1).tolist() == used
    assert (records[0].ids == EXPERTS).sum() == sum(max(used) - n for n in used)
    expected = answer("olmoe", site.experts, seen["h"], gates)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)


def test_nobody_never_spoils_gradients_either(model_of) -> None:
    """Without its flag the grouped product leaves the rows of nobody undefined in both passes."""
    model = make_model("olmoe")
    site = find_moe_layers(model)[0]
    config = site.router_config().replace(select={"kind": "top_p", "p": 0.5})
    found = []
    for name in ("eager", "grouped_mm"):
        model.zero_grad()
        # Freed memory full of NaN: what an undefined row would be made of.
        waste = [torch.full((size, WIDTH), float("nan")) for size in (48, 96, 120, 192)]
        del waste
        with using(model, name), site.reroute(config):
            model(tokens()).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for eager, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, eager, rtol=1e-4, atol=1e-6)


def test_unknown_implementations_are_refused_where_nobody_is_chosen(model_of, monkeypatch) -> None:
    model = model_of("olmoe")
    site = find_moe_layers(model)[0]
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    ALL_EXPERTS_FUNCTIONS.register("novel", grouped_mm_experts_forward)
    top_p = site.router_config().replace(select={"kind": "top_p", "p": 0.8})
    with using(model, "novel"):
        with site.reroute(site.router_config()):
            logits_after(model)
        match = "experts_implementation: 'novel' is not allowed; allowed: 'eager' or 'grouped_mm'"
        with site.reroute(top_p), pytest.raises(ConfigError, match=match):
            logits_after(model)
    assert not site.router._forward_hooks and not site.experts._forward_hooks


def test_rank_random_and_own_functions(model_of) -> None:
    model = model_of("qwen3_moe")
    site = find_moe_layers(model)[0]
    records: list[Routing] = []
    second = site.router_config().replace(select={"kind": "rank", "ranks": [1]}, weight="raw")
    with site.reroute(second), site.tap(records.append):
        logits_after(model)
    ranked = records[0].probs.sort(dim=1, descending=True)
    assert torch.equal(records[0].ids[:, 0], ranked.indices[:, 1])
    torch.testing.assert_close(records[0].gates[:, 0], ranked.values[:, 1])

    drawn = site.router_config().replace(select={"kind": "random", "k": 3})
    found = []
    for seed in (0, 0, 1):
        with site.reroute(drawn, rng=torch.Generator().manual_seed(seed)), site.tap(records.append):
            logits_after(model)
        found.append(records[-1].ids.sort(dim=1).values)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def only_the_first(routing: Routing) -> Routing:
        return routing.replace(ids=torch.zeros(24, 1, dtype=torch.long), gates=torch.ones(24, 1))

    with site.reroute(only_the_first):
        seen, _, _ = experts_seen(site)
    expected = answer("qwen3_moe", site.experts, seen["h"], [{0: 1.0}] * 24)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)


def test_changes_work_together_in_one_order(model_of) -> None:
    """Edit, then rule, then tap: whoever began first, and whichever site object asked."""
    model = model_of("mixtral")
    delta = torch.linspace(-2, 2, EXPERTS)
    rule = find_moe_layers(model)[0].router_config().replace(select={"kind": "top_k", "k": 2})
    found = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        records: list[Routing] = []
        first, second, third = (find_moe_layers(model)[0] for _ in range(3))
        changes = [first.edit_logits(delta), second.reroute(rule), third.tap(records.append)]
        with ExitStack() as stack:
            for index in order:
                stack.enter_context(changes[index])
            found.append((logits_after(model), records[0]))
    plain: list[Routing] = []
    with tap(model, plain.append):
        logits_after(model)
    for logits, record in found:
        assert torch.equal(logits, found[0][0])
        torch.testing.assert_close(record.logits, plain[0].logits + delta)
        assert record.ids.shape == (24, 2)


def test_a_change_can_stay_and_be_taken_back(model_of) -> None:
    model = model_of("olmoe")
    before = logits_after(model)
    site = find_moe_layers(model)[0]
    change = site.edit_logits(torch.linspace(-3, 3, EXPERTS)).apply()
    assert not torch.equal(before, logits_after(model))
    with pytest.raises(RuntimeError, match="already applied"):
        change.apply()
    change.undo()
    change.undo()
    assert torch.equal(before, logits_after(model))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_a_delta_through_a_frozen_model(implementation: str) -> None:
    """Equals the gradient of the written-out layer, gates and all."""
    pytest.importorskip("transformers")
    model = make_model("mixtral").requires_grad_(False)
    site = find_moe_layers(model)[1]
    weight = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(3))
    delta = torch.zeros(EXPERTS, requires_grad=True)
    kept: dict[str, Tensor] = {}
    hook = site.experts.register_forward_hook(lambda m, a, o: kept.update(h=a[0], ids=a[1], y=o))
    with using(model, implementation), site.edit_logits(delta):
        model(tokens())
    hook.remove()
    (kept["y"] * weight).sum().backward()
    assert delta.grad is not None and all(p.grad is None for p in model.parameters())

    shift = torch.zeros(EXPERTS, requires_grad=True, dtype=torch.float64)
    logits = logits_of("mixtral", site.router, kept["h"]) + shift
    chosen = logits.softmax(1).gather(1, kept["ids"])
    gates = chosen / chosen.sum(1, keepdim=True)
    ones = [
        [answer("mixtral", site.experts, h[None], [{e: 1.0}])[0] for e in ids]
        for h, ids in zip(kept["h"], kept["ids"].tolist())
    ]
    answers = torch.stack([torch.stack(row) for row in ones])
    ((gates[:, :, None] * answers).sum(1) * weight).sum().backward()
    assert delta.grad.abs().max() > 0.01
    torch.testing.assert_close(delta.grad.double(), shift.grad, rtol=1e-4, atol=1e-5)


def test_C_a_copy_of_a_watched_model_is_not_recorded(model_of) -> None:
    """Its calls are its own; what was changed in the model is changed in the copy."""
    model, seen = model_of("mixtral"), list[Routing]()
    with tap(model, seen.append) as sites:
        copied = copy.deepcopy(model)
        copied(tokens())
        assert not seen
        model(tokens())
        assert len(seen) == len(sites)
    with sites[0].edit_logits(torch.arange(EXPERTS).float()):
        edited = copy.deepcopy(model)
        expected = logits_after(model)
    assert torch.equal(logits_after(edited), expected)
    assert not torch.equal(logits_after(model), expected)
