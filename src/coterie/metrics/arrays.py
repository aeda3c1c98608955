"""Checks and distances shared by the metrics on feature rows [S, D]."""

from __future__ import annotations

import numpy as np

from coterie.core.errors import DataError, describe

CHUNK = 2048  # rows whose distances to all others are held at once


def check_pair(
    first: np.ndarray, second: np.ndarray, least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Both as f64 [S, D] with equal D; DataError on bad shapes, few rows, non-finite values."""
    first, second = check_rows("first", first, least), check_rows("second", second, least)
    if first.shape[1] != second.shape[1]:
        raise DataError(describe("second.shape[1]", second.shape[1], f"{first.shape[1]} as first"))
    return first, second


def check_rows(name: str, rows: np.ndarray, least: int) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise DataError(describe(f"{name}.shape", rows.shape, "[samples, dimensions]"))
    if len(rows) < least:
        raise DataError(describe(f"{name}: number of rows", len(rows), f"at least {least}"))
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise DataError(f"{name}: row {int(bad[0])} holds NaN or infinity")
    return rows


def squared_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[R, S] squared Euclidean distances, never negative."""
    table = np.square(rows).sum(1)[:, None] + np.square(others).sum(1) - 2 * rows @ others.T
    return np.maximum(table, 0.0)
