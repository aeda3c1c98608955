"""Point clouds to voxels and back (DiT-3D, arXiv:2307.01831; PVCNN, arXiv:1907.03739).

The cube that holds a cloud has V cells per axis, with centres at the integers 0..V-1; points keep
their float coordinates in it for the way back. Cells are row-major. Shapes: B batch, P points,
V cells per axis, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.errors import DataError


@dataclass(frozen=True, eq=False)
class Voxels:
    """A point cloud on a grid of cells."""

    means: Tensor  # [B, V^3, 3], mean of the points in each cell; 0 in empty cells
    counts: Tensor  # i64 [B, V^3], points in each cell
    cells: Tensor  # i64 [B, P], cell of each point
    coordinates: Tensor  # [B, P, 3] in 0..V-1


def check_clouds(x_BP3: Tensor) -> None:
    """DataError that names the first cloud that is not finite or has all points in one place.

    Only on the CPU; on a GPU the check would stall every step.
    """
    if x_BP3.device.type != "cpu" or torch.compiler.is_compiling():
        return
    spread_B = (x_BP3 - x_BP3[:, :1]).abs().amax(dim=(1, 2))
    for bad, reason in (
        (~torch.isfinite(spread_B), "holds NaN or infinity"),
        (spread_B == 0, "has all its points in one place: it cannot be scaled"),
    ):
        if bool(bad.any()):
            raise DataError(f"x: cloud {int(bad.nonzero()[0])} {reason}")


def place(x_BP3: Tensor, size: int) -> Tensor:
    """Coordinates in the cube, [B, P, 3] in 0..V-1, without gradient.

    Centred on the mean, divided by twice the largest distance from it, moved to [0, 1], times V,
    clamped: a function of the cloud alone, whatever its place and scale.
    """
    x = x_BP3.detach()
    x = x - x.mean(dim=1, keepdim=True)
    reach = x.norm(dim=2).amax(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    unit = x / (2 * reach[:, None, None]) + 0.5
    return (unit * size).clamp(0, size - 1)


def voxelise(x_BP3: Tensor, size: int) -> Voxels:
    """Mean coordinates of the points of every cell; float32 or wider."""
    x = x_BP3.to(torch.promote_types(x_BP3.dtype, torch.float32))
    coordinates = place(x, size)
    near = coordinates.nan_to_num().round().long()
    cells_BP = (near[..., 0] * size + near[..., 1]) * size + near[..., 2]
    B, P, _ = x.shape
    counts = torch.zeros(B, size**3, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, cells_BP, torch.ones_like(cells_BP))
    sums = x.new_zeros(B, size**3, 3).scatter_add(1, cells_BP[:, :, None].expand(B, P, 3), x)
    return Voxels(sums / counts.clamp_min(1)[:, :, None], counts, cells_BP, coordinates)


def devoxelise(grid_BVC: Tensor, coordinates_BP3: Tensor, size: int) -> Tensor:
    """Trilinear interpolation of cell values [B, V^3, C] at float coordinates: [B, P, C]."""
    grid = grid_BVC.to(coordinates_BP3.dtype).transpose(1, 2).unflatten(2, (size, size, size))
    # grid_sample counts in -1..1 and names the last axis first.
    where = (coordinates_BP3 * (2 / (size - 1)) - 1).flip(-1)[:, :, None, None]
    values = F.grid_sample(grid, where, padding_mode="border", align_corners=True)
    return values.flatten(2).transpose(1, 2)
