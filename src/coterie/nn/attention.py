"""Multi-head self attention over one set of tokens, and over a second set that was kept.

Shapes: B batch, N tokens, M kept tokens, D width, H heads, G key and value heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.nn.embed import rotary_table, rotate
from coterie.nn.windows import Windows


class Memory(NamedTuple):
    """Keys and values of further tokens to attend to, from :meth:`SelfAttention.keys_values`."""

    keys_values: Tensor  # [B, 2, M, G*d]
    mask: Tensor | None = None  # bool [B, M], False = nobody attends to it


class SelfAttention(nn.Module):
    """[B, N, D] -> [B, N, D]; optional causal mask, query/key normalisation, rotary positions.

    With ``windows`` the tokens of each window see each other and nothing else. ``kv_heads`` <
    ``heads``: equal runs of query heads share a key and value head (grouped-query attention,
    arXiv:2305.13245).
    """

    rotary: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        causal: bool = False,
        rotary_length: int = 0,  # longest sequence; 0 = no rotary positions
        windows: Windows | None = None,
        kv_heads: int | None = None,  # None = heads
        head_width: int | None = None,  # None = width / heads
        dropout: float = 0.0,  # of the answer, in training
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.causal = causal
        self.windows = windows
        self.head_width = head_width = head_width or width // heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * head_width, bias=qkv_bias)
        self.out = nn.Linear(heads * head_width, width)
        self.qk_norm = qk_norm
        self.query_norm = nn.RMSNorm(head_width, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width, eps=1e-6) if qk_norm else nn.Identity()
        self.rotary_length = rotary_length
        if rotary_length:
            cos, sin = rotary_table(rotary_length, head_width)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    def forward(
        self,
        x_BND: Tensor,
        token_mask_BN: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """``memory``: more tokens to attend to, before those of x; only without windows, causal
        masks and rotary positions."""
        if self.windows is None:
            return self._attend(x_BND, token_mask_BN, memory)
        mask = token_mask_BN
        if mask is not None:
            mask = self.windows.split(mask[:, :, None])[:, :, 0]
        return self.windows.join(self._attend(self.windows.split(x_BND), mask))

    def keys_values(self, x_BND: Tensor) -> Tensor:
        """[B, 2, N, G*d]: what a :class:`Memory` of these tokens holds."""
        queries = self.heads * self.head_width
        kept = self.qkv(x_BND)[..., queries:].unflatten(2, (-1, self.head_width))
        k, v = kept.chunk(2, dim=2)
        return torch.stack([self.key_norm(k).flatten(2), v.flatten(2)], dim=1)

    def _attend(
        self, x_BND: Tensor, token_mask_BN: Tensor | None, memory: Memory | None = None
    ) -> Tensor:
        N = x_BND.shape[1]
        qkv = self.qkv(x_BND).unflatten(2, (-1, self.head_width)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary_length:
            cos, sin = self.get_buffer("rotary_cos")[:N], self.get_buffer("rotary_sin")[:N]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None if token_mask_BN is None else self._key_mask(token_mask_BN)
        if memory is not None:
            kept = memory.keys_values.unflatten(3, (self.kv_heads, -1)).unbind(1)
            k, v = (_after(*pair) for pair in zip(kept, (k, v)))
            mask = self._with_memory(mask, memory, N)
        causal = self.causal and mask is None
        grouped = self.kv_heads < self.heads
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        y = self.out(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    @staticmethod
    def _with_memory(mask: Tensor | None, memory: Memory, N: int) -> Tensor | None:
        """bool [B, 1, N, M + N]; None where everybody sees everything."""
        if mask is None and memory.mask is None:
            return None
        B, _, M, _ = memory.keys_values.shape
        seen = memory.mask
        if seen is None:
            seen = torch.ones(B, M, dtype=torch.bool, device=memory.keys_values.device)
        if mask is None:
            mask = torch.ones(B, 1, N, N, dtype=torch.bool, device=seen.device)
        return torch.cat([seen[:, None, None].expand(-1, -1, N, -1), mask], dim=3)

    def _key_mask(self, token_mask_BN: Tensor) -> Tensor:
        """bool [B, 1, N, N]; a token always sees itself, so that padding rows stay finite."""
        N = token_mask_BN.shape[1]
        eye = torch.eye(N, dtype=torch.bool, device=token_mask_BN.device)
        allowed = token_mask_BN[:, None, None, :] | eye
        return allowed & torch.ones_like(eye).tril() if self.causal else allowed


def _after(kept_BMGd: Tensor, own_BGNd: Tensor) -> Tensor:
    """[B, G, M + N, d], stored token by token as both are, so that what was kept is one copy."""
    return torch.cat([kept_BMGd, own_BGNd.transpose(1, 2)], dim=1).transpose(1, 2)
