"""Frechet distance between Gaussians fitted to two sets of features (arXiv:1706.08500, eq. 6).

It is biased upwards for finite sets, the more the wider the feature: print the floor (real against
real at the same number of samples) and the extractor's name beside it.
"""

from __future__ import annotations

import numpy as np

from coterie.metrics.arrays import check_pair


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between feature rows [S1, D] and [S2, D]; symmetric, in squared feature units, >= 0."""
    first, second = check_pair(first, second)
    return gaussian_frechet(
        first.mean(axis=0), _covariance(first), second.mean(axis=0), _covariance(second)
    )


def gaussian_frechet(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of means [D] and covariances [D, D]."""
    root = _sqrt(cov1)
    # tr (C1 C2)^(1/2) through the symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    shared = np.linalg.eigvalsh(root @ cov2 @ root)
    cross = np.sqrt(np.maximum(shared, 0.0)).sum()
    gap = np.square(mean1 - mean2).sum()
    return float(max(gap + np.trace(cov1) + np.trace(cov2) - 2.0 * cross, 0.0))


def _covariance(rows: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(rows, rowvar=False))


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    values, axes = np.linalg.eigh(matrix)
    return (axes * np.sqrt(np.maximum(values, 0.0))) @ axes.T
