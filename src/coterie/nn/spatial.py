"""Blocks on feature maps: a residual block with time embedding, a transformer with cross-attention.

Of the shapes, names of parts and initialisation that latent diffusion has (Rombach et al. 2022).
Shapes: B batch, C channels, H x W pixels, N = HW, M tokens of the condition.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """[B, C, H, W] -> the same; ``time_width``: of the embedding that is added in the middle."""

    def __init__(self, channels: int, time_width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h_BCHW: Tensor, time_BT: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(h_BCHW)))
        inner = inner + self.time(F.silu(time_BT))[:, :, None, None]
        return h_BCHW + self.conv2(F.silu(self.norm2(inner)))


class CrossAttention(nn.Module):
    """Queries from x [B, N, C], keys and values from ``seen`` [B, M, S]; a bias at the end only."""

    def __init__(self, width: int, heads: int, seen_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(seen_width, width, bias=False)
        self.value = nn.Linear(seen_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, seen_BMS: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x_BNC), self.key(seen_BMS), self.value(seen_BMS))
        )
        mask = None if mask_BM is None else mask_BM[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class SpatialBlock(nn.Module):
    """Self-attention, attention to the condition where there is one, gated feed-forward network."""

    def __init__(self, width: int, heads: int, seen_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.itself = CrossAttention(width, heads, width)
        self.norm2 = nn.LayerNorm(width) if seen_width else None
        self.condition = CrossAttention(width, heads, seen_width) if seen_width else None
        self.norm3 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BNC: Tensor, seen_BMS: Tensor | None, mask_BM: Tensor | None) -> Tensor:
        h = self.norm1(x_BNC)
        x_BNC = x_BNC + self.itself(h, h)
        if self.condition is not None and self.norm2 is not None:
            assert seen_BMS is not None
            x_BNC = x_BNC + self.condition(self.norm2(x_BNC), seen_BMS, mask_BM)
        value, gate = self.up(self.norm3(x_BNC)).chunk(2, dim=-1)
        return x_BNC + self.down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """[B, C, H, W] -> the same: ``layers`` blocks over the pixels as tokens, added to the map.

    ``seen_width``: of the tokens of the condition; 0: there is none.
    """

    def __init__(
        self, channels: int, heads: int, layers: int, seen_width: int, groups: int
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            SpatialBlock(channels, heads, seen_width) for _ in range(layers)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(
        self, h_BCHW: Tensor, seen_BMS: Tensor | None = None, mask_BM: Tensor | None = None
    ) -> Tensor:
        z_BNC = self.proj_in(self.norm(h_BCHW)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            z_BNC = block(z_BNC, seen_BMS, mask_BM)
        out = z_BNC.transpose(1, 2).unflatten(2, h_BCHW.shape[2:])
        added: Tensor = self.proj_out(out)
        return h_BCHW + added
