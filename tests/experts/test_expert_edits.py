"""Edits of logits: which candidates are open, when, and what noise and trained shifts do."""

from __future__ import annotations

import torch
from expert_cases import BATCH, context, inputs, router

from coterie.core.context import Context
from coterie.experts import Router
from coterie.experts.routers import ProgressiveCandidates


def test_candidate_mask_closes_experts_for_selection_and_probability() -> None:
    made = router(edits=[{"kind": "candidates", "allowed": [1, 4]}])
    routing = made(inputs(7), context(7))
    assert set(routing.ids.flatten().tolist()) <= {1, 4}
    torch.testing.assert_close(routing.probs[:, [1, 4]].sum(1), torch.ones(14))
    routing.gates.square().sum().backward()
    grad = made.score.proj.weight.grad
    assert grad.isfinite().all() and grad[[0, 2, 3, 5]].abs().max() == 0
    few = router(edits=[{"kind": "candidates", "allowed": [1]}])(inputs(7), context(7))
    assert (few.ids == torch.tensor([1, 6])).all() and (few.gates[:, 1] == 0).all()


def test_candidates_by_task_follow_each_sample() -> None:
    edit = {"kind": "candidates", "by_task": [[0, 1], [2, 3, 5]]}
    routing = router(edits=[edit])(inputs(7), context(7))
    ids = routing.ids.view(BATCH, 7, -1)
    assert set(ids[0].flatten().tolist()) <= {0, 1}
    assert set(ids[1].flatten().tolist()) <= {2, 3, 5}


def test_zero_delta_changes_nothing_and_learns() -> None:
    plain, edited = router(), router(edits=["bias_delta"])
    h, ctx = inputs(7), context(7)
    assert torch.equal(plain(h, ctx).logits, edited(h, ctx).logits)
    edited(h, ctx).gates.square().sum().backward()
    assert edited.edits[0].delta.grad.abs().max() > 0


def test_jitter_needs_training_and_a_generator() -> None:
    h = inputs(7)
    for form in ("normal", "uniform"):
        made = router(edits=[{"kind": "jitter", "scale": 0.5, "form": form}])
        quiet = made(h, context(7)).logits

        def noisy(training: bool = True) -> torch.Tensor:
            rng = torch.Generator().manual_seed(0)
            return made(h, context(7).replace(training=training, rng=rng)).logits  # noqa: B023

        assert not torch.equal(noisy(), quiet) and torch.equal(noisy(), noisy())
        assert torch.equal(noisy(training=False), quiet)


def test_progressive_candidates_follow_their_schedule() -> None:
    """ReXMoE: N = 64, four pools, steps 10k..30k: 73 at 11k, 160 at 20k, all 256 at 30k."""
    part = ProgressiveCandidates(start=64, begin=0.1, end=0.3)
    assert [part.count(p, 256, 64) for p in (0.0, 0.1, 0.11, 0.2, 0.3, 1.0)] == [
        64, 64, 73, 160, 256, 256,
    ]  # fmt: skip
    made = router(12, edits=[{"kind": "progressive", "start": 3, "begin": 0.0, "end": 0.5}])
    ctx = context(7).replace(progress=0.25, rng=torch.Generator().manual_seed(0))
    logits = made(inputs(7), ctx).logits
    assert ((logits > float("-inf")).sum(1) == 7).all()
    assert (made(inputs(7), ctx.replace(training=False)).logits > float("-inf")).all()


def test_progressive_steps_open_one_layer_after_the_other() -> None:
    part = ProgressiveCandidates(begin=0.0, end=0.6, mode="steps")
    shares = (0.0, 0.19, 0.21, 0.41, 0.59, 0.6)
    assert [part.count(p, 32, 8) for p in shares] == [8, 8, 16, 24, 24, 32]


def test_closed_probabilities_are_zero_and_the_rest_is_not_normalised() -> None:
    """ReXMoE closes candidates after the softmax: their scores are set to zero."""
    edit = {"kind": "progressive", "start": 3, "begin": 0.5, "end": 1.0, "masks": "probs"}
    made, plain = router(6, edits=[edit]), router(6)
    plain.load_state_dict(made.state_dict())
    ctx = context(7).replace(progress=0.0, rng=torch.Generator().manual_seed(0))
    closed, whole = made(inputs(7), ctx), plain(inputs(7), ctx)
    shut = closed.probs == 0
    assert (shut.sum(1) == 3).all() and (shut == shut[0]).all()
    assert torch.equal(closed.probs, whole.probs.masked_fill(shut, 0.0))
    assert not shut.gather(1, closed.ids).any()
    assert torch.equal(made(inputs(7), ctx.replace(training=False)).probs, whole.probs)


def test_layers_of_a_pool_may_draw_apart_or_together() -> None:
    first = context(7).replace(pool_layers=(1, 3), layer=1, progress=0.0)
    edit = {"kind": "progressive", "begin": 0.0, "end": 1.0}
    for drawn, together in (("layer", False), ("pool", True)):
        made = router(40, edits=[{**edit, "drawn": drawn}])
        first = first.replace(rng=torch.Generator().manual_seed(0))
        second = first.replace(layer=3)  # of the same pass: the same generator, moved on
        assert (made_open(made, first) == made_open(made, second)) is together
        later = second.replace(rng=torch.Generator().manual_seed(1))
        assert made_open(made, first) != made_open(made, later)
        other = first.replace(pool_layers=(4, 6), layer=4)
        assert made_open(made, first) != made_open(made, other)


def test_candidates_open_by_their_share_after_each_step() -> None:
    made, plain = router(6, edits=[{"kind": "opening", "steps": 4}]), router(6)
    plain.load_state_dict(made.state_dict(), strict=False)
    h, ctx = inputs(7), context(7)
    whole = plain(h, ctx)
    assert torch.equal(made(h, ctx).probs, whole.probs)  # a new router is open
    made.edits[0].share[:4] = torch.tensor([0.0, 0.0, -0.5, 0.5])
    odds = whole.probs * torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0])
    closed = made(h, ctx.replace(training=False))
    torch.testing.assert_close(closed.probs, odds / odds.sum(1, keepdim=True))
    assert torch.equal(closed.probs, made(h, ctx).probs)
    assert not closed.probs[:, :3].any() and closed.ids.min() >= 3
    for _ in range(4):
        made.after_step()
    assert made.edits[0].share.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    again = router(6, edits=[{"kind": "opening", "steps": 4}])
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(h, ctx).probs, made(h, ctx).probs)


def test_own_candidates_come_first_in_a_shared_pool() -> None:
    ctx = context(7).replace(pool_layers=(1, 3, 4), layer=3, progress=0.5)
    ctx = ctx.replace(rng=torch.Generator().manual_seed(0))
    edit = {"kind": "progressive", "begin": 0.0, "end": 1.0, "order": "own_first"}
    open_ = made_open(router(6, edits=[edit]), ctx)
    assert len(open_) == 4 and {2, 3} <= open_  # own two, and half of the other four
    assert made_open(router(6, edits=[{"kind": "candidates", "own": True}]), ctx) == {2, 3}


def made_open(made: Router, ctx: Context) -> set[int]:
    logits = made(inputs(7), ctx).logits
    return set((logits > float("-inf")).all(0).nonzero()[:, 0].tolist())
