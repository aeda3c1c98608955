"""What this machine can do at best, measured: the limits that figures are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coterie.bench.timing import Place, interleaved

_BYTES = 128 * 2**20  # far beyond any cache
_ROW = 4096


def read_bandwidth(place: Place, rounds: int = 3) -> float:
    """Bytes per second at which torch reads 128 MiB of float32: the best of the rounds, and of a
    sum, the product of two vectors, and that of a matrix and a vector which stays in the cache."""
    values = torch.ones(_BYTES // 4, device=place.device)
    first, second = values.chunk(2)
    matrix, vector = values.view(-1, _ROW), values[:_ROW].clone()
    readers: dict[str, Callable[[], Tensor]] = {
        "sum": values.sum,
        "dot": lambda: first.dot(second),
        "matrix times vector": lambda: matrix.mv(vector),
    }
    with place.entered():
        times = interleaved(readers, place, rounds)
    return _BYTES / min(min(seconds) for seconds in times.values())
