"""What sources of point clouds share: their frame, and clouds that are made when they are read.

A cloud is f32 [P, 3] in the unit ball, y upwards: the middle of its bounding box is the origin, the
farthest point has distance 1. Legend: B batch, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.data.source import SourceConfig

Array = np.ndarray
REMEMBERED_BYTES = 64 * 2**20


class CloudConfig(SourceConfig):
    """``num_points`` of every cloud, drawn on its surface."""

    num_points: int = Field(default=512, ge=2, le=1_000_000)  # points of a sample

    def shape(self) -> tuple[int, int]:
        return self.num_points, 3


def to_unit_ball(points: Array, name: str) -> Array:
    """``points`` [P, 3] moved and scaled into the unit ball, f32.

    DataError for a cloud that is empty, not finite, or one single place.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise DataError(describe(f"{name}: shape of the cloud", points.shape, "[points >= 1, 3]"))
    if not np.isfinite(points).all():
        raise DataError(f"{name}: holds NaN or infinity")
    centred = points - (points.min(axis=0) + points.max(axis=0)) / 2
    reach = np.linalg.norm(centred, axis=1).max()
    if reach == 0:
        raise DataError(f"{name}: all points are in one place")
    if not np.isfinite(reach):
        raise DataError(f"{name}: coordinates too large to measure distances between points")
    return (centred / reach).astype(np.float32)


class MadeClouds:
    """Rows that are made when they are read: ``make(row)`` -> f32 [P, 3], a pure function.

    The newest are remembered, as making one may take longer than a training step's share of it.
    """

    def __init__(self, count: int, make: Callable[[int], Array], num_points: int) -> None:
        self._count, self._num_points = count, num_points
        self._make = lru_cache(maxsize=max(1, REMEMBERED_BYTES // (12 * num_points)))(make)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Any) -> Array:
        """f32 [B, P, 3] of rows i64 [B]."""
        clouds = [self._make(int(row)) for row in rows]
        return np.stack(clouds) if clouds else np.zeros((0, self._num_points, 3), np.float32)
