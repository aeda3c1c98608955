"""How well scores rank: AUC over all samples, and GAUC within each user.

GAUC = sum_u n_u AUC_u / sum_u n_u over users with both answers, n_u their samples (HoME,
arXiv:2408.05430): what a ranking inside one user's list is worth, blind to how users differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.core.errors import DataError, describe

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grouped:
    """GAUC. ``value``: NaN if no user has both labels; ``users`` were counted, ``dropped`` had one
    label only."""

    value: float
    users: int
    dropped: int


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(describe("labels", truth.shape, f"one per score, {values.shape}"))
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"score {index} is not finite")
    if not np.isin(truth, (0, 1)).all():
        wrong = truth[~np.isin(truth, (0, 1))][0]
        raise DataError(describe("labels", wrong.item(), "0 or 1; leave unknown ones out"))
    return values, truth.astype(bool)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half; NaN where one of
    the two is missing."""
    values, truth = _checked(scores, labels)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return float("nan")
    others = np.sort(values[~truth])
    below = np.searchsorted(others, values[truth], side="left").sum()
    ties = np.searchsorted(others, values[truth], side="right").sum() - below
    return float((below + ties / 2) / (positive * negative))


def gauc(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> Grouped:
    """AUC of each user, weighted by samples; users with one label only are left out."""
    values, truth = _checked(scores, labels)
    owner = np.asarray(users)
    if owner.shape != values.shape:
        raise DataError(describe("users", owner.shape, f"one per score, {values.shape}"))
    order = np.argsort(owner, kind="stable")
    ends = np.flatnonzero(np.diff(owner[order])) + 1
    total = weight = 0.0
    count = dropped = 0
    for rows in np.split(order, ends) if len(order) else []:
        own = auc(values[rows], truth[rows])
        if np.isnan(own):
            dropped += 1
            continue
        total, weight, count = total + len(rows) * own, weight + len(rows), count + 1
    return Grouped(total / weight if weight else float("nan"), count, dropped)
