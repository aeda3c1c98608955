"""Embeddings of time, labels and positions.

Shapes: B batch, N tokens, D width, S sinusoid channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError, describe


def sinusoid(value_B: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """[cos | sin] features of a scalar, f32 [B, channels], in DiT's order."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=value_B.device) / half
    angle = value_B.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """tau: scalar time -> sinusoid -> Linear -> SiLU -> Linear. [B] -> [B, D]."""

    def __init__(self, width: int, channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def reset_parameters(self) -> None:
        for layer in (self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, value_B: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return self.mlp(sinusoid(value_B, self.channels).to(dtype))


class LabelEmbedding(nn.Module):
    """Class embedding whose last row stands for "no condition" (NULL_LABEL). [B] -> [B, D]."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, label_B: Tensor) -> Tensor:
        self._check(label_B)
        return self.table(torch.where(label_B < 0, self.num_classes, label_B))

    def _check(self, label_B: Tensor) -> None:
        """On the CPU only: elsewhere reading the answer back would stall every step."""
        if label_B.device.type != "cpu" or torch.compiler.is_compiling():
            return
        bad = (label_B >= self.num_classes) | (label_B < NULL_LABEL)
        if bool(bad.any()):
            value = int(label_B[bad][0])
            allowed = f"0..{self.num_classes - 1}, or {NULL_LABEL} for no condition"
            raise DataError(describe("label", value, allowed))


def sincos_1d(positions: Tensor, channels: int) -> Tensor:
    """[sin | cos] of positions with periods up to 10000. [P] -> f32 [P, channels]."""
    half = channels // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * omega[None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sincos_grid(sizes: tuple[int, ...], width: int) -> Tensor:
    """Fixed positions of a 1-, 2- or 3-D grid, row-major: f32 [prod(sizes), width].

    Each axis takes an equal even share of the channels; in 2-D the column comes first, as in MAE
    and DiT. Channels left over (width not divisible) stay zero.
    """
    share = width // (2 * len(sizes)) * 2
    axes = torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij")
    parts = [sincos_1d(axis.reshape(-1), share) for axis in reversed(axes)]
    table = torch.cat(parts, dim=-1)
    return nn.functional.pad(table, (0, width - table.shape[-1]))


def rotary_table(length: int, head_width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions (Su et al. 2021), f32 [length, head_width / 2]."""
    half = head_width // 2
    omega = 1.0 / base ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * omega[None]
    return angle.cos(), angle.sin()


def rotate(x_BHNd: Tensor, cos_Nh: Tensor, sin_Nh: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of queries or keys by their position's angle."""
    first, second = x_BHNd.chunk(2, dim=-1)
    cos, sin = cos_Nh.to(x_BHNd.dtype), sin_Nh.to(x_BHNd.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
