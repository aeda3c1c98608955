"""Where to cut the noise axis between members, from their losses per bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_mixtures import DATA, F64, NOTHING, process, whole
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition, Prediction
from coterie.ensembles import NoiseRangesConfig, losses_per_bin, search_boundaries
from coterie.process import ExactDenoiser, Mixture


def test_the_best_cut_is_that_of_all_cuts() -> None:
    rng = np.random.default_rng(0)
    edges = np.linspace(0.0, 1.0, 8)
    for keep in (False, True):
        table = rng.random((3, 7))
        found = search_boundaries(table, edges, keep_order=keep)
        best = float("inf")
        orders = [(0, 1, 2)] if keep else [(a, b, c) for a in range(3) for b in range(3)
                                           for c in range(3) if len({a, b, c}) == 3]  # fmt: skip
        for order in orders:
            for first in range(8):
                for second in range(first, 8):  # noisy bins are the last ones
                    owner = [order[2]] * first + [order[1]] * (second - first)
                    owner += [order[0]] * (7 - second)
                    best = min(best, float(np.mean([table[m, n] for n, m in enumerate(owner)])))
        assert found.loss == pytest.approx(best)
        assert found.best_alone == pytest.approx(float(table.mean(1).min()))
        assert list(found.boundaries) == sorted(found.boundaries, reverse=True)
        assert len(found.members) == len(found.boundaries) + 1


def test_experts_of_known_ranges_are_cut_where_they_were_made() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    table = [[3.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 3.0], [3.0, 1.0, 1.0, 3.0]]
    found = search_boundaries(table, edges)
    assert found.members == (0, 2, 1) and found.boundaries == (0.75, 0.25)
    assert found.loss == 1.0 and found.best_alone == 2.0
    alone = search_boundaries([[1.0] * 4, [2.0] * 4], edges)  # nobody needs the second
    assert alone.members == (0,) and alone.boundaries == ()


def test_tables_with_gaps_are_refused() -> None:
    with pytest.raises(DataError, match=r"losses\[1\]\[0\]"):
        search_boundaries([[1.0, 2.0], [float("nan"), 1.0]], [0.0, 0.5, 1.0])
    with pytest.raises(DataError, match="edges"):
        search_boundaries([[1.0, 2.0]], [0.0, 1.0])
    with pytest.raises(ConfigError, match="keep_order"):
        search_boundaries(np.ones((20, 2)), [0.0, 0.5, 1.0])
    assert search_boundaries(np.ones((20, 2)), [0.0, 0.5, 1.0], keep_order=True).loss == 1.0


def test_losses_per_bin_find_who_is_good_where() -> None:
    narrow = Mixture(DATA.means, DATA.stds, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5], dtype=F64))
    poor = ExactDenoiser(process(), narrow)

    class Upper(ExactDenoiser):
        """Exact above 0.5, and below as poor as the other is above."""

        def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
            right, wrong = super().__call__(x, t, cond), poor(x, t, cond)
            return right.replace(value=torch.where(t[:, None] > 0.5, right.value, wrong.value))

    class Lower(Upper):
        def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
            right, wrong = whole()(x, t, cond), poor(x, t, cond)
            return right.replace(value=torch.where(t[:, None] > 0.5, wrong.value, right.value))

    x0, _ = DATA.sample(200, torch.Generator().manual_seed(0))
    batches = [Batch(part, NOTHING, torch.arange(100)) for part in x0.split(100)]
    edges = np.linspace(0.05, 0.95, 10)
    members = {"low": Lower(process(), DATA), "high": Upper(process(), DATA)}
    made = NoiseRangesConfig(boundaries=(0.9,)).build(members)
    table = losses_per_bin(made, batches, edges.tolist())
    assert np.array_equal(table, losses_per_bin(made, batches, edges.tolist()))
    found = search_boundaries(table, edges)
    assert found.members == (1, 0)
    assert found.boundaries[0] == pytest.approx(0.45) or found.boundaries[0] == pytest.approx(0.55)
    assert found.loss < found.best_alone
