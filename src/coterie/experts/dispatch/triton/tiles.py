"""How work is cut: sizes of tiles, and which expert each tile belongs to, decided on the device.

No number of the routing comes to the host: a call launches as many tiles as *any* routing of its
size may need, and those beyond the last one end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coterie.experts.dispatch.triton.kernels import tiles_kernel

GROUP = 8  # tiles that walk the columns of a weight together, to find it in L2
_MAP_BLOCK = 64


class Blocks(NamedTuple):
    """Sizes of one program's tile, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


ROLES = ("hidden", "answer", "hidden_grad", "row_grad", "weight_grad")
"""The products of a call: forward, then those of the gradients."""

MEASURED: dict[tuple[str, int, int, int], Blocks] = {}
"""(role, columns, depth, bytes of a number) -> what a device was fastest with, where somebody has
measured; of a weight's gradient, (role, height, width, bytes). Else the rules below hold."""


def cdiv(size: int, block: int) -> int:
    """Blocks that cover ``size``. Triton's own, made for kernels too, is slow on the host."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def row_block(assignments: int, num_experts: int) -> int:
    """Places in a tile: about as many as an expert has, so that few are empty."""
    mean = assignments / num_experts
    return 128 if mean >= 96 else 64 if mean >= 48 else 32 if mean >= 24 else 16


def divisor(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``, if 64 or more; else one that
    wastes little."""
    for block in (256, 128, 64):
        if block <= most and size % block == 0:
            return block
    return max(16, min(most, 64 if size > 64 else power_of_two(size)))


def row_blocks(
    role: str, rows: int, columns: int, depth: int, itemsize: int, halves: int = 1
) -> Blocks:
    """For a product of tiles of ``rows`` places with ``columns`` columns, summed over ``depth``;
    ``halves``: tiles of float32 as wide that a program holds at once.

    16-bit types: on Hopper 128 x 256 is what feeds the matrix units from L2; two tiles in registers
    leave room for 128 columns each. Such a program has a multiprocessor for itself, and its shared
    memory holds four stages; of smaller ones two fit.
    """
    measured = MEASURED.get((role, columns, depth, itemsize))
    if measured is not None:
        return measured._replace(rows=rows)
    if itemsize > 2:
        block = divisor(columns, 64)
        return Blocks(min(rows, 64), block, min(32, _depth(depth)), 4, 2)
    block = divisor(columns, 256 if halves == 1 else 128)
    held = rows * block * halves
    warps, stages = 8 if held >= 128 * 128 else 4, 4 if held >= 128 * 256 else 3
    return Blocks(rows, block, min(64, _depth(depth)), warps, stages)


def weight_blocks(height: int, width: int, itemsize: int) -> Blocks:
    """For a gradient [height, width] summed over the rows of an expert. Rows that are found through
    an index need two stages each: five hold three tiles."""
    measured = MEASURED.get(("weight_grad", height, width, itemsize))
    if measured is not None:
        return measured
    if itemsize > 2:
        return Blocks(divisor(height, 64), divisor(width, 64), 32, 4, 2)
    rows, columns = divisor(height, 128), divisor(width, 256)
    return Blocks(rows, columns, 64, 8 if rows * columns >= 128 * 128 else 4, 5)


def _depth(size: int) -> int:
    return max(16, power_of_two(size))


class TileMap(NamedTuple):
    """``expert`` i32 [tiles] (E beyond the last one) and ``place`` i32 [tiles]."""

    expert: Tensor
    place: Tensor

    @property
    def number(self) -> int:
        return self.expert.shape[0]


def make_map(bounds: Tensor, assignments: int, rows: int) -> TileMap:
    """Tiles of ``rows`` places from ``bounds`` i32 [E + 1]; room for any routing of this size:
    the sum of ceil(n_e / rows) never passes it."""
    num_experts = bounds.shape[0] - 1
    count = min(assignments, (assignments + num_experts * (rows - 1)) // rows)
    tiles = TileMap(*torch.empty(2, count, dtype=torch.int32, device=bounds.device).unbind(0))
    tiles_kernel[(cdiv(count, _MAP_BLOCK),)](
        bounds,
        tiles.expert,
        tiles.place,
        count,
        E=num_experts,
        BM=rows,
        ROUND_E=power_of_two(num_experts),
        BLOCK=_MAP_BLOCK,
    )
    return tiles
