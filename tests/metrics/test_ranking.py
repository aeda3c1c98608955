"""AUC and GAUC against brute force over all pairs."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from coterie.core.errors import DataError
from coterie.metrics import auc, gauc


def brute(scores, labels):
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])


def drawn(seed, count=300, users=20):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 15, count) / 4.0  # with ties
    return scores, (rng.random(count) < 0.3).astype(int), rng.integers(0, users, count)


@pytest.mark.parametrize("seed", range(4))
def test_auc_counts_pairs(seed):
    scores, labels, _ = drawn(seed, 60)
    assert auc(scores, labels) == pytest.approx(brute(scores, labels), abs=1e-12)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_gauc_is_the_weighted_mean_over_users(seed):
    scores, labels, users = drawn(seed, 120, 25)
    total = weight = used = 0
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            total += own.sum() * brute(scores[own], labels[own])
            weight, used = weight + own.sum(), used + 1
    found = gauc(scores, labels, users)
    assert found.value == pytest.approx(total / weight, abs=1e-12)
    assert (found.users, found.dropped) == (used, len(np.unique(users)) - used)
    assert found.dropped > 0


def test_gauc_ignores_how_users_differ_and_auc_does_not():
    scores, _, users = drawn(1)
    labels = (np.random.default_rng(2).random(300) < users / 20).astype(int)  # users differ
    moved = np.exp(scores) * (1 + users) + 50 * users  # monotone within each user
    assert gauc(moved, labels, users).value == pytest.approx(gauc(scores, labels, users).value)
    assert abs(auc(moved, labels) - auc(scores, labels)) > 0.05


def test_without_both_answers_there_is_no_number():
    assert math.isnan(auc([0.1, 0.2], [1, 1]))
    found = gauc([0.1, 0.2, 0.3], [1, 1, 0], [0, 0, 1])
    assert math.isnan(found.value) and (found.users, found.dropped) == (0, 2)
    assert gauc([], [], []).users == 0


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, math.nan], [0, 1], "score 1 is not finite"),
        ([0.1], [0, 1], "one per score"),
        ([0.1, 0.2], [0, 2], "0 or 1; leave unknown ones out"),
        ([0.1, 0.2], [0, math.nan], "leave unknown ones out"),
    ],
)
def test_bad_input_is_named(scores, labels, message):
    with pytest.raises(DataError, match=message):
        auc(scores, labels)
