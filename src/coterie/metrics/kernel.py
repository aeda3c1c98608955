"""Kernel distance (arXiv:1801.01401): unbiased squared MMD under a cubic kernel.

Unlike the Frechet distance it has no finite-sample bias: between two halves of one set it scatters
around zero and may be negative. Legend: S samples, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coterie.core.errors import ConfigError, describe
from coterie.metrics.arrays import CHUNK, check_pair


class Estimate(NamedTuple):
    value: float
    stderr: float


def kid_unbiased(first: np.ndarray, reference: np.ndarray, blocks: int = 10) -> Estimate:
    """Squared MMD between rows [S1, D] and [S2, D], kernel ``(x.y / D + 1)^3``.

    Features are divided by the standard deviation of ``reference`` so that no channel rules by its
    scale alone. The value uses all pairs; the standard error comes from independent blocks, which
    overstates it a little. ``blocks`` is lowered where a block would hold under two rows.
    """
    first, reference = check_pair(first, reference, least=4)
    if blocks < 2:
        raise ConfigError(describe("blocks", blocks, "an integer >= 2"))
    scale = reference.std(axis=0)
    scale[scale == 0] = 1.0
    first, reference = first / scale, reference / scale
    blocks = min(blocks, len(first) // 2, len(reference) // 2)
    # Strided blocks: rows sorted by class must not make blocks of one class.
    parts = [_mmd(first[i::blocks], reference[i::blocks]) for i in range(blocks)]
    stderr = float(np.std(parts, ddof=1) / np.sqrt(blocks))
    return Estimate(_mmd(first, reference), stderr)


def _mmd(first: np.ndarray, second: np.ndarray) -> float:
    """The U-statistic: pairs of a row with itself are left out."""
    one, two = len(first), len(second)
    within1 = (_kernel_sum(first, first) - _self_sum(first)) / (one * (one - 1))
    within2 = (_kernel_sum(second, second) - _self_sum(second)) / (two * (two - 1))
    return within1 + within2 - 2.0 * _kernel_sum(first, second) / (one * two)


def _kernel_sum(first: np.ndarray, second: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(first), CHUNK):
        inner = first[start : start + CHUNK] @ second.T / first.shape[1]
        total += float(((inner + 1.0) ** 3).sum())
    return total


def _self_sum(rows: np.ndarray) -> float:
    return float(((np.square(rows).sum(axis=1) / rows.shape[1] + 1.0) ** 3).sum())
