"""Cutting a grid of tokens into windows, and putting them together again.

Tokens lie row-major on a grid of any number of axes. Shapes: B batch, N tokens, D channels,
W windows of one sample, M = side^axes tokens of one window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from coterie.core.errors import ConfigError, describe


@dataclass(frozen=True)
class Windows:
    """Windows of ``side`` tokens along every axis of ``grid``."""

    grid: tuple[int, ...]
    side: int

    def __post_init__(self) -> None:
        if self.side < 1 or any(size % self.side for size in self.grid):
            allowed = f"a divisor of the grid of tokens {self.grid}"
            raise ConfigError(describe("window", self.side, allowed))

    def split(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B*W, M, D]."""
        B, _, D = x_BND.shape
        cut = [part for size in self.grid for part in (size // self.side, self.side)]
        axes = len(self.grid)
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
        return x_BND.reshape(B, *cut, D).permute(order).reshape(-1, self.side**axes, D)

    def join(self, x_WMD: Tensor) -> Tensor:
        """[B*W, M, D] -> [B, N, D], the inverse of :meth:`split`."""
        axes = len(self.grid)
        counts = [size // self.side for size in self.grid]
        order = [0, *[i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)], 2 * axes + 1]
        x = x_WMD.reshape(-1, *counts, *[self.side] * axes, x_WMD.shape[-1])
        return x.permute(order).reshape(-1, math.prod(self.grid), x_WMD.shape[-1])
