"""Distances between point clouds, and metrics of sets of clouds.

Of two clouds: ``cd``, the Chamfer distance, mean squared distance to the nearest point, both ways
summed; ``emd_squared`` and ``emd_euclidean``, mean squared or mean plain distance under the
matching of points that makes it least (exact; DiT-3D's code approximates the squared one). Compare
numbers of one definition, at equal P and equal normalisation, only.

Of two sets (arXiv:1906.12320, section 5): the accuracy of a one-nearest-neighbour classifier of
real against generated (1-NNA, best 0.5), the share of real clouds that are nearest to a generated
one (COV, best 1), the mean distance of a real cloud to the nearest generated one (MMD, best 0).

Shapes: S and R clouds, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe, unknown
from coterie.core.rng import numpy_generator

Array = np.ndarray
CHUNK = 2**20  # points whose nearest neighbours are looked up at once


def as_clouds(name: str, clouds: Any, least: int = 1) -> Array:
    """f64 [S, P, 3]; DataError for other shapes, too few clouds, or values that are not finite."""
    values = clouds.detach().cpu().numpy() if isinstance(clouds, Tensor) else clouds
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or values.shape[2] != 3 or values.shape[1] == 0:
        raise DataError(describe(f"{name}.shape", values.shape, "[clouds, points >= 1, 3]"))
    if len(values) < least:
        raise DataError(describe(f"{name}: number of clouds", len(values), f"at least {least}"))
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
    if bad.size:
        raise DataError(f"{name}: cloud {int(bad[0])} holds NaN or infinity")
    return values


def chamfer_table(first: Array, second: Array) -> Array:
    """Chamfer distances [S, R] of clouds [S, P, 3] and [R, Q, 3]."""
    there = _nearest_table(first, second)
    back = there if first is second else _nearest_table(second, first)
    return there + back.T


def _nearest_table(first: Array, second: Array) -> Array:
    """[S, R]: mean squared distance of the points of one cloud to the nearest of the other."""
    out = np.empty((len(first), len(second)))
    rows = max(1, CHUNK // first.shape[1])
    for column, cloud in enumerate(second):
        tree = cKDTree(cloud, leafsize=32)
        for start in range(0, len(first), rows):
            distance, _ = tree.query(first[start : start + rows])
            out[start : start + rows, column] = np.square(distance).mean(axis=1)
    return out


def matching_table(first: Array, second: Array, squared: bool) -> Array:
    """Optimal matching distances [S, R] of clouds [S, P, 3] and [R, P, 3]; one pair at a time."""
    if first.shape[1] != second.shape[1]:
        hint = "a matching pairs all points"
        raise DataError(describe("second.shape[1]", second.shape[1], str(first.shape[1]), hint))
    out = np.empty((len(first), len(second)))
    for row, column in np.ndindex(out.shape):
        if first is second and column < row:
            out[row, column] = out[column, row]
            continue
        cost = cdist(first[row], second[column], "sqeuclidean" if squared else "euclidean")
        out[row, column] = cost[linear_sum_assignment(cost)].mean()
    return out


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "cd": chamfer_table,
    "emd_squared": lambda first, second: matching_table(first, second, squared=True),
    "emd_euclidean": lambda first, second: matching_table(first, second, squared=False),
}


def cloud_distance(first: Any, second: Any, distance: str = "cd") -> float:
    """Of two clouds [P, 3] and [Q, 3], by a name of :data:`DISTANCES`."""
    one, two = as_clouds("first", first[None]), as_clouds("second", second[None])
    return float(_table(distance)(one, two)[0, 0])


def _table(distance: str) -> Callable[[Array, Array], Array]:
    if distance not in DISTANCES:
        raise ConfigError(unknown("distance", distance, DISTANCES))
    return DISTANCES[distance]


class SetScores(NamedTuple):
    """``one_nn``: 1-NNA; ``coverage``: COV; ``mmd``: MMD in the distance's unit."""

    one_nn: float
    coverage: float
    mmd: float


def compare_sets(own: Array, cross: Array, real: Array) -> SetScores:
    """From distances within the generated set [S, S], of generated to real clouds [S, R], and
    within the real set [R, R]; S = R."""
    size = len(own)
    if own.shape != (size, size) or cross.shape != own.shape or real.shape != own.shape:
        shapes = (own.shape, cross.shape, real.shape)
        raise DataError(describe("shapes of the tables", shapes, "three times [S, S]"))
    if size < 2:
        raise DataError(describe("number of clouds", size, "at least 2 in each set"))
    return SetScores(
        one_nn=(_recognised(own, cross) + _recognised(real, cross.T)) / (2 * size),
        coverage=len(np.unique(cross.argmin(axis=1))) / size,
        mmd=float(cross.min(axis=0).mean()),
    )


def _recognised(own: Array, cross: Array) -> float:
    """How many clouds have their nearest neighbour in their own set; a tie counts half."""
    others = own + np.diag(np.full(len(own), np.inf))
    gap = cross.min(axis=1) - others.min(axis=1)
    return float((gap > 0).sum() + 0.5 * (gap == 0).sum())


def score_points(
    generated: Any,
    reference: Any,
    real: Any = None,
    distances: Sequence[str] = ("cd",),
    seed: int = 0,
) -> dict[str, Any]:
    """1-NNA, COV and MMD of ``generated`` against ``reference`` clouds, f32 [S, P, 3] each.

    ``real``: other real clouds, whose scores in the place of the generated ones are the floor. The
    smallest set gives ``n``; the others are thinned to ``n`` clouds drawn by ``seed``. JSON-ready:
    ``n`` and, per score and distance (``one_nn_cd``), ``value`` and, with ``real``, ``floor``.
    """
    sets = {"generated": generated, "reference": reference}
    sets |= {} if real is None else {"real": real}
    clouds = {name: as_clouds(name, values, least=2) for name, values in sets.items()}
    count = min(len(values) for values in clouds.values())
    thin = {name: _thin(name, values, count, seed) for name, values in clouds.items()}
    report: dict[str, Any] = {"n": count}
    for distance in distances:
        table = _table(distance)
        within = table(thin["reference"], thin["reference"])
        found = {
            name: compare_sets(table(values, values), table(values, thin["reference"]), within)
            for name, values in thin.items()
            if name != "reference"
        }
        for field in SetScores._fields:
            entry = {"value": getattr(found["generated"], field)}
            if real is not None:
                entry["floor"] = getattr(found["real"], field)
            report[f"{field}_{distance}"] = entry
    return report


def _thin(name: str, clouds: Array, count: int, seed: int) -> Array:
    rows = numpy_generator(seed, "score_points", name).permutation(len(clouds))[:count]
    return clouds[np.sort(rows)]
