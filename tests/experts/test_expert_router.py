"""Routers: selections, weights, masks and partitions as their papers state them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from expert_cases import BATCH, CASES, WIDTH, build, context, inputs, router
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.context import NULL_LABEL, Context
from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.experts import RouterConfig
from coterie.experts.routers import (
    ExpertChoice,
    GroupLimited,
    RandomK,
    Rank,
    TopK,
    TopP,
    top_ids,
)

PLAIN = Context(1, 1)


def select(part, scores: torch.Tensor, ctx: Context = PLAIN, valid=None) -> torch.Tensor:
    return part.select(scores, ctx, (1, scores.shape[0]), valid)


# Selections


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5),
    st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lowest_index(rows: list[list[int]], k: int) -> None:
    """Equals a stable sort in plain Python; ``topk`` makes no promise about ties."""
    expected = [sorted(range(7), key=lambda e: -row[e])[:k] for row in rows]
    assert top_ids(torch.tensor(rows, dtype=torch.float32), k).tolist() == expected


def test_candidates_at_minus_infinity_are_never_chosen() -> None:
    scores = torch.tensor([[float("-inf"), 0.2, float("-inf"), 0.5]])
    for k in (1, 2, 3, 4):
        assert top_ids(scores, k).tolist() == [[3, 1, 4, 4][:k]]


def test_top_p_takes_the_fewest_whose_sum_exceeds_p() -> None:
    probs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    for p in (0.05, 0.3, 0.6, 0.95):
        ids = select(TopP(p=p), probs)
        for row, chosen in zip(probs.tolist(), ids.tolist()):
            kept = [row[e] for e in chosen if e < 6]
            assert sum(kept) > p - 1e-6 and kept == sorted(kept, reverse=True)
            assert len(kept) == 1 or sum(kept[:-1]) <= p + 1e-6
    above = torch.tensor([[0.5, 0.5 + 2**-20, 1e-9]])  # rounded, and more than 1 in all
    for rows in (probs, above):
        every = select(TopP(p=1.0), rows)
        assert every.shape == rows.shape and (every < rows.shape[1]).all()
    uniform = torch.full((1, 5), 0.2)
    assert (select(TopP(p=0.5), uniform) < 5).sum() == math.floor(0.5 * 5) + 1
    assert (select(TopP(p=0.5, max_k=2), uniform) < 5).sum() == 2
    assert (select(TopP(p=0.1, min_k=4), uniform) < 5).sum() == 4
    assert (select(TopP(p=0.5), torch.tensor([[0.0, 1.0, 0.0]])) < 3).sum() == 1


def test_rank_takes_places_of_the_descending_order() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert select(Rank(ranks=(1, 3)), scores).tolist() == [[3, 0]]


def test_group_limited_selection_equals_its_definition() -> None:
    scores = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    for form, best in (("max", 1), ("top2_sum", 2)):
        part = GroupLimited(k=4, groups=4, top_groups=2, group_score=form)
        for row, ids in zip(scores.tolist(), select(part, scores).tolist()):
            groups = [row[g * 3 : g * 3 + 3] for g in range(4)]
            strength = [sum(sorted(group, reverse=True)[:best]) for group in groups]
            kept = sorted(range(4), key=lambda g: -strength[g])[:2]
            open_ = [e for e in range(12) if e // 3 in kept]
            assert ids == sorted(open_, key=lambda e: -row[e])[:4]


@pytest.mark.parametrize("k", [0.3, 1.0, 2.0, 6.0])
def test_expert_choice_fills_each_expert_to_capacity_per_sample(k: float) -> None:
    tokens, num_experts = 8, 6
    part = ExpertChoice(k=k)
    scores = torch.rand(2 * tokens, num_experts, generator=torch.Generator().manual_seed(0))
    ids = part.select(scores, PLAIN, (2, tokens), None)
    capacity = max(1, min(math.floor(tokens / num_experts * k), tokens))
    for sample in range(2):
        own = ids[sample * tokens : (sample + 1) * tokens]
        for expert in range(num_experts):
            taken = [t for t in range(tokens) if expert in own[t].tolist()]
            column = scores[sample * tokens : (sample + 1) * tokens, expert].tolist()
            assert taken == sorted(sorted(range(tokens), key=lambda t: -column[t])[:capacity])


def test_expert_choice_of_one_sample_ignores_its_batch_mates() -> None:
    made = router(
        select={"kind": "expert_choice", "k": 1.0}, score="cosine", probability="identity"
    )
    h = inputs(9).detach()
    both = made(h, context(9))
    for sample in range(BATCH):
        alone = made(h[sample : sample + 1], Context(1, 9))
        mine = both.gates.view(BATCH, 9, -1)[sample].sum(1)
        torch.testing.assert_close(alone.gates.sum(1), mine)


def test_random_selection_draws_by_probability_in_training_only() -> None:
    probs = torch.tensor([0.6, 0.3, 0.1]).expand(20000, 3)
    ctx = Context(1, 1, training=True, rng=torch.Generator().manual_seed(0))
    ids = select(RandomK(k=2), probs, ctx)
    assert (ids[:, 0] != ids[:, 1]).all()
    first = torch.bincount(ids[:, 0], minlength=3) / 20000
    torch.testing.assert_close(first, probs[0], atol=0.015, rtol=0)
    pairs = ((ids == 0).any(1) & (ids == 1).any(1)).float().mean()
    assert pairs == pytest.approx(0.6 * 0.3 / 0.4 + 0.3 * 0.6 / 0.7, abs=0.015)
    for quiet in (Context(1, 1, training=True), Context(1, 1, rng=torch.Generator())):
        assert select(RandomK(k=2), probs[:3], quiet).tolist() == [[0, 1]] * 3


# Weights and probabilities


def test_raw_renormalised_and_constant_gates() -> None:
    h, ctx = inputs(7), context(7)
    raw = router()(h, ctx)
    chosen = raw.probs.gather(1, raw.ids)
    assert torch.equal(raw.gates, chosen) and (raw.gates.sum(1) < 1).all()
    assert torch.equal(raw.probs, raw.logits.softmax(1))
    renorm = router(weight="renorm", scale=2.5)(h, ctx)
    torch.testing.assert_close(renorm.gates, 2.5 * chosen / chosen.sum(1, keepdim=True))
    after = router(when="after")(h, ctx)
    torch.testing.assert_close(after.gates, raw.logits.gather(1, raw.ids).softmax(1))
    one = router(weight="one")(h, ctx)
    assert (one.gates == 1).all() and torch.equal(one.ids, raw.ids)


def test_straight_through_gates_are_one_with_the_gradient_of_the_probability() -> None:
    h, ctx = inputs(7), context(7)
    fields = {"select": {"kind": "top_k", "k": 1}, "scale": 0.5}
    through, raw = (router(weight=weight, **fields) for weight in ("straight_through", "raw"))
    raw.load_state_dict(through.state_dict())
    routing = through(h, ctx)
    assert (routing.gates == 0.5).all()
    up = torch.randn(routing.gates.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((up * routing.gates).sum(), list(through.parameters()))
    (expected,) = torch.autograd.grad((up * raw(h, ctx).gates).sum(), list(raw.parameters()))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


def test_selection_bias_moves_choices_and_never_gates() -> None:
    made = router(selection_bias=True, probability="sigmoid")
    h, ctx = inputs(7), context(7)
    assert made.selection_bias is not None
    before = made(h, ctx)
    made.selection_bias[5] = 10.0
    after = made(h, ctx)
    assert (after.ids[:, 0] == 5).all() and not torch.equal(before.ids, after.ids)
    torch.testing.assert_close(after.gates, after.logits.sigmoid().gather(1, after.ids))


def test_an_experts_scale_multiplies_its_gates_and_moves_no_choice() -> None:
    h, ctx = inputs(5), context(5)
    made = router(expert_scale=True, weight="renorm", scale=2.0)
    before = made(h, ctx)
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5, -1.0, 0.25])
    with torch.no_grad():
        made.expert_scale.copy_(scale)
    after = made(h, ctx)
    assert torch.equal(before.ids, after.ids)
    torch.testing.assert_close(after.gates, before.gates * scale[before.ids])
    torch.testing.assert_close(before.gates.sum(1), torch.full((len(before.ids),), 2.0))
    constant = router(expert_scale=True, weight="one")
    with torch.no_grad():
        constant.expert_scale.copy_(scale)
    routing = constant(h, ctx)
    assert torch.equal(routing.gates, scale[routing.ids])


def test_given_logits_go_through_the_same_rule() -> None:
    h, ctx = inputs(5), context(5)
    fields = {"weight": "renorm", "select": {"kind": "top_k", "k": 3}, "scale": 1.5}
    scored = router(**fields)
    expected = scored(h, ctx)
    given_logits = RouterConfig.from_dict({**fields, "score": "given"}).build(6, 6)
    found = given_logits(expected.logits.view(BATCH, -1, 6), ctx)
    for name in ("ids", "gates", "probs", "logits"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    with pytest.raises(ConfigError, match=r"score\.kind: 'given' .*with 4 experts"):
        RouterConfig.from_dict({"score": "given"}).build(4, 6)


def test_softmax_is_applied_once() -> None:
    # transformers PR #45111: a second softmax pulled the balance loss to its uniform value.
    made = router()
    with torch.no_grad():
        made.score.proj.weight.mul_(30)
    routing = made(inputs(7), context(7))
    torch.testing.assert_close(routing.probs, routing.logits.softmax(1))
    assert routing.probs.amax(1).mean() > 0.9
    assert (routing.logits < 0).any() and routing.logits.abs().max() > 1


def test_router_stays_float32_under_autocast_and_in_low_precision() -> None:
    h = inputs(7).detach()
    exact = router()(h, context(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router()(h, context(7))
    assert torch.equal(exact.logits, cast.logits)
    for name in CASES:
        layer = build(name, torch.bfloat16)
        routing = layer(inputs(7, dtype=torch.bfloat16), context(7)).routings[0]
        assert {routing.logits.dtype, routing.probs.dtype, routing.gates.dtype} == {torch.float32}


# Masks, partition


@pytest.mark.parametrize("name", CASES)
def test_padding_is_never_routed_or_counted(name: str) -> None:
    mask = torch.ones(BATCH, 6, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1] = False
    routing = build(name)(inputs(6), context(6, mask=mask)).routings[0]
    real = mask.flatten() if routing.unit == "token" else mask.any(1)
    assert routing.mask is not None and not (routing.mask & ~real).any()
    assert (routing.ids[~real] == routing.num_experts).all() and (routing.gates[~real] == 0).all()
    assert routing.one_hot()[~real].sum() == 0


def test_padding_may_hold_anything() -> None:
    mask = torch.tensor([[True, True, False]])
    h = torch.randn(1, 3, WIDTH)
    for unit in ("token", "sample"):
        made = router(unit=unit)
        clean = made(h, Context(1, 3, token_mask=mask)).probs[:1]
        dirty = h.clone()
        dirty[0, 2] = float("nan")
        routing = made(dirty, Context(1, 3, token_mask=mask))
        assert torch.equal(routing.probs[:1], clean)
        routing.gates.square().sum().backward()
        assert made.score.proj.weight.grad.isfinite().all()


def test_unconditional_samples_go_to_the_reserved_expert() -> None:
    for score in ("cosine", "linear"):
        made = router(4, score=score, partition="null_label", probability="identity")
        routing = made(inputs(5), context(5, null=(1,)))
        assert routing.num_experts == 5 and routing.probs.shape == (10, 5)
        assert (routing.ids[5:] == torch.tensor([4, 5])).all()
        assert (routing.gates[5:] == torch.tensor([1.0, 0.0])).all()
        assert routing.mask.tolist() == [True] * 5 + [False] * 5
        assert (routing.ids[:5] < 4).all() and routing.counts()[4] == 0
        assert (routing.probs[:, 4] == 0).all()
    assert made(inputs(5), context(5).replace(label=None)).mask.all()


def test_partition_reads_the_label_after_dropout() -> None:
    made = router(4, score="cosine", partition="null_label", probability="identity")
    dropped = torch.tensor([NULL_LABEL, 3])
    routing = made(inputs(2), Context(2, 2, label=dropped))
    assert routing.mask.tolist() == [False, False, True, True]


def test_sample_choice_is_independent_of_batch_mates() -> None:
    for name in CASES:
        layer = build(name)
        layer.train(not layer.pool.kind.batch_statistics)
        h = inputs(5).detach()
        ctx = context(5)
        both = layer(h, ctx).y
        for i in range(BATCH):
            row = slice(i, i + 1)
            alone = ctx.replace(
                batch=1,
                step_index=ctx.step_index[row],
                time_embedding=ctx.time_embedding[row],
                label=ctx.label[row],
                task=ctx.task[row],
            )
            torch.testing.assert_close(layer(h[row], alone).y, both[row], atol=1e-5, rtol=1e-5)


def test_record_carries_where_it_was_made() -> None:
    ctx = context(3).replace(layer=4, slot="pre_block", round=1)
    routing = router()(inputs(3), ctx)
    assert isinstance(routing, Routing)
    assert (routing.layer, routing.slot, routing.round, routing.batch) == (
        4,
        "pre_block",
        1,
        (2, 3),
    )
    assert routing.step_index is ctx.step_index and routing.sample_ids is ctx.sample_ids


def test_permuting_experts_with_router_rows_permutes_the_choice() -> None:
    made, other = router(), router()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    with torch.no_grad():
        other.score.proj.weight.copy_(made.score.proj.weight[order])
    h = inputs(7)
    first, second = made(h, context(7)), other(h, context(7))
    assert torch.equal(order[second.ids], first.ids)
    torch.testing.assert_close(second.gates, first.gates)


def test_top_k_of_every_kind_keeps_best_first() -> None:
    for part, seed in itertools.product((TopK(k=3), GroupLimited(k=3, groups=2)), range(3)):
        scores = torch.rand(20, 6, generator=torch.Generator().manual_seed(seed))
        ids = select(part, scores)
        chosen = scores.gather(1, ids)
        assert (chosen.diff(dim=1) <= 0).all()
