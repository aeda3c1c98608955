"""What this machine can do at best: the limits that figures are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROW = 4096


def readers(size: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """Ways in which torch reads ``size`` bytes of float32 (to 16 KiB), by name: a sum, the product
    of two vectors, that of a matrix and a vector which stays in the cache."""
    rows = -(-size // (4 * _ROW))
    matrix = torch.ones(rows, _ROW, device=device)
    vector, flat = matrix[0].clone(), matrix.flatten()
    first, second = flat[: flat.numel() // 2], flat[flat.numel() // 2 :]
    return {
        "read: sum": flat.sum,
        "read: dot": lambda: first.dot(second),
        "read: matrix times vector": lambda: matrix.mv(vector),
    }
