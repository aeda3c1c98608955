"""Precision and recall of generated samples (arXiv:1904.06991)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coterie.core.errors import ConfigError, describe
from coterie.metrics.arrays import CHUNK, check_pair, squared_distances


class PrecisionRecall(NamedTuple):
    precision: float  # share of generated samples within the real manifold
    recall: float  # share of real samples within the generated manifold


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> PrecisionRecall:
    """From feature rows [S1, D] and [S2, D]; compare numbers at equal S and k only."""
    if k < 1:
        raise ConfigError(describe("k", k, "an integer >= 1"))
    generated, real = check_pair(generated, real, least=k + 1)
    return PrecisionRecall(_covered(generated, real, k), _covered(real, generated, k))


def _covered(rows: np.ndarray, others: np.ndarray, k: int) -> float:
    """Share of ``rows`` that lie in the ball of at least one of ``others``."""
    radii = np.concatenate(
        [
            # index k, not k - 1: the nearest neighbour of a sample within its own set is itself
            np.partition(squared_distances(others[start : start + CHUNK], others), k, axis=1)[:, k]
            for start in range(0, len(others), CHUNK)
        ]
    )
    inside = [
        (squared_distances(rows[start : start + CHUNK], others) <= radii).any(axis=1)
        for start in range(0, len(rows), CHUNK)
    ]
    return float(np.concatenate(inside).mean())
