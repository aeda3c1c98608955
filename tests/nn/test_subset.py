"""Subsets of tokens: how many are kept, which, and that they come back where they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.nn.subset import (
    draw_subset,
    keep_counts,
    keep_tokens,
    restore_tokens,
    subset_mask,
)


@given(st.lists(st.integers(0, 700), min_size=1, max_size=4), st.floats(0, 1))
def test_keep_counts_follow_the_rule(sizes: list[int], drop: float) -> None:
    rates = [drop] * len(sizes)
    found = keep_counts(torch.tensor([sizes]), rates)[0].tolist()
    assert found == [min(n, max(1, round((1 - drop) * n))) for n in sizes]


@pytest.mark.parametrize("drop", [(0.0,), (0.5,), (0.99,), (1.0,)])
def test_one_group_keeps_the_same_number_in_every_sample(drop: tuple[float]) -> None:
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    ids = draw_subset(scores, torch.zeros(3, 40, dtype=torch.long), drop)
    assert ids.shape == (3, max(1, round((1 - drop[0]) * 40)))
    assert subset_mask(ids, 40) is None
    lowest = scores.argsort(dim=1)[:, : ids.shape[1]].sort(dim=1).values
    assert torch.equal(ids, lowest)


def test_each_group_keeps_its_own_number_and_short_samples_are_padded() -> None:
    groups = torch.zeros(3, 40, dtype=torch.long)
    groups[0, :10], groups[1, :30], groups[2, :0] = 1, 1, 1
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    ids = draw_subset(scores, groups, (0.9, 0.5))
    mask = subset_mask(ids, 40)
    assert mask is not None
    for row, (zeros, ones) in enumerate(((3, 5), (1, 15), (4, 0))):
        kept = ids[row][mask[row]]
        assert len(kept) == len(kept.unique()) == zeros + ones
        assert torch.equal(kept, kept.sort().values)
        assert int(groups[row, kept].sum()) == ones
        assert (ids[row, len(kept) :] == 40).all()
    assert ids.shape[1] == 16


def test_every_member_of_a_group_is_kept_equally_often() -> None:
    groups = (torch.arange(12) < 4).long().expand(4000, 12)
    scores = torch.rand(4000, 12, generator=torch.Generator().manual_seed(0))
    ids = draw_subset(scores, groups, (0.75, 0.5))
    share = torch.bincount(ids.flatten(), minlength=12) / 4000
    torch.testing.assert_close(share[:4], torch.full((4,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(share[4:], torch.full((8,), 0.25), atol=0.03, rtol=0)


def test_restore_undoes_keep_for_any_order_and_fills_the_rest() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, generator=rng)
    fill = torch.tensor([7.0, 8.0, 9.0])
    for _ in range(5):
        ids = torch.stack([torch.randperm(9, generator=rng) for _ in range(2)])
        assert torch.equal(restore_tokens(keep_tokens(x, ids), ids, 9, fill), x)
    part = torch.tensor([[4, 0, 9], [8, 3, 5]])  # 9 = padding
    back = restore_tokens(keep_tokens(x, part), part, 9, fill)
    for row, kept in enumerate(([4, 0], [8, 3, 5])):
        gone = [i for i in range(9) if i not in kept]
        assert torch.equal(back[row, kept], x[row, kept])
        assert torch.equal(back[row, gone], fill.expand(len(gone), 3))


def test_gradients_reach_what_was_kept_and_the_fill() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    fill = torch.zeros(2, requires_grad=True)
    ids = torch.tensor([[1, 3, 5]])
    restore_tokens(keep_tokens(x, ids), ids, 5, fill).sum().backward()
    assert x.grad is not None and fill.grad is not None
    assert x.grad[0, :, 0].tolist() == [0, 1, 0, 1, 0]  # padding reads a token but writes nowhere
    assert fill.grad.tolist() == [3, 3]
