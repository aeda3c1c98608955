"""No candidate is taken twice, however few a row has."""

from __future__ import annotations

import pytest
import torch

from coterie.experts.routers import top_ids

CLOSED = float("-inf")


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("column", [0, 3, 5])
def test_a_row_with_one_candidate_takes_it_once(k: int, column: int) -> None:
    scores = torch.full((2, 6), CLOSED)
    scores[0, column] = -0.5
    ids = top_ids(scores, k)
    assert ids[0].tolist() == [column, *[6] * (k - 1)]
    assert ids[1].tolist() == [6] * k


def test_both_ways_of_finding_the_best_agree() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 3, (200, 5), generator=rng).float()
    scores = scores.masked_fill(torch.rand(200, 5, generator=rng) < 0.5, CLOSED)
    every = top_ids(scores, 5)
    for k in (1, 2, 3, 4):
        assert torch.equal(top_ids(scores, k), every[:, :k])
