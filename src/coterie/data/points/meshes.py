"""Triangles of OBJ files, and points drawn evenly on their surface.

Legend: T triangles, V vertices, P points.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from coterie.core.errors import DataError
from coterie.data.points.clouds import Array


def read_obj(content: bytes, name: str) -> Array:
    """Triangles f64 [T, 3, 3] of a Wavefront OBJ file; faces of more corners become fans.

    Only ``v`` and ``f`` are read: materials, normals and groups do not matter here. DataError
    naming ``name`` and the line for what cannot be read, and for a file without a face.
    """
    vertices: list[tuple[float, ...]] = []
    corners: list[tuple[int, int, int]] = []
    for number, line in enumerate(content.replace(b"\\\n", b" ").splitlines(), start=1):
        word, _, rest = line.strip().partition(b" ")
        try:
            if word == b"v":
                x, y, z = (float(value) for value in rest.split()[:3])
                vertices.append((x, y, z))
            elif word == b"f":
                face = [_index(item, len(vertices)) for item in rest.split()]
                corners += [(face[0], b, c) for b, c in pairwise(face[1:])]
        except ValueError as error:
            raise DataError(f"{name}: line {number}: {error}") from None
    if not corners:
        raise DataError(f"{name}: holds no face")
    triangles = np.array(vertices)[np.array(corners)]
    if not np.isfinite(triangles).all():
        raise DataError(f"{name}: a vertex is not finite")
    return triangles


def _index(item: bytes, count: int) -> int:
    """0-based vertex of ``7``, ``7/1``, ``7//3`` or (counted back) ``-1``."""
    number = int(item.split(b"/", 1)[0])
    index = number - 1 if number > 0 else count + number
    if not 0 <= index < count:
        raise ValueError(f"vertex {number} of {count}")
    return index


def sample_surface(
    triangles: Array, count: int, rng: np.random.Generator, name: str = "mesh"
) -> Array:
    """``count`` points f64 [count, 3], drawn evenly by area. DataError for a surface without."""
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    areas = np.linalg.norm(np.cross(first, second), axis=1) / 2
    total = areas.sum()
    if not 0 < total < np.inf:
        raise DataError(f"{name}: its triangles have no area, or one too large to measure")
    chosen = rng.choice(len(triangles), size=count, p=areas / total)
    u, v = rng.uniform(size=(2, count, 1))
    over = u + v > 1  # the other half of the parallelogram, folded back
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    corner: Array = triangles[chosen, 0] + u * first[chosen] + v * second[chosen]
    return corner
