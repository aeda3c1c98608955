"""Cutting images into square patches, row-major."""

from __future__ import annotations

from torch import Tensor


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch^2] with N = HW / patch^2."""
    B, C, H, W = x_BCHW.shape
    rows, columns = H // patch, W // patch
    x = x_BCHW.reshape(B, C, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, rows * columns, C * patch * patch)
