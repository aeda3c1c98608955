"""Some tokens of a sequence: drawing them, picking them out, putting them back.

A subset is ``ids`` i64 [B, K], ascending, where L (the number of tokens) marks padding: samples of
one batch may keep different numbers. Shapes: B batch, L tokens, K kept at most, G groups, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.core.share import largest


def keep_counts(sizes_BG: Tensor, drop: Sequence[float]) -> Tensor:
    """i64 [B, G]: how many of the members of each group stay when a share ``drop`` [G] goes.

    ``max(1, round((1 - drop) * size))``, and 0 of an empty group.
    """
    share = 1 - torch.tensor(drop, dtype=torch.float64, device=sizes_BG.device)
    kept = (share * sizes_BG).round().long().clamp_min(1)
    return torch.minimum(kept, sizes_BG)


def draw_subset(scores_BL: Tensor, groups_BL: Tensor, drop: Sequence[float]) -> Tensor:
    """Keep the tokens with the lowest scores of each group; ids i64 [B, K].

    ``scores`` in [0, 1): with uniform random numbers the members of a group are drawn uniformly
    without replacement. ``groups`` i64 in 0..G-1, G = len(drop).
    """
    L = scores_BL.shape[1]
    numbers = torch.arange(len(drop), device=groups_BL.device)
    sizes_BG = (groups_BL[:, :, None] == numbers).sum(1)
    counts_BG = keep_counts(sizes_BG, drop)
    order_BL = (scores_BL.double() + groups_BL).argsort(dim=1)  # group by group, each shuffled
    sorted_BL = groups_BL.gather(1, order_BL)
    starts_BG = sizes_BG.cumsum(1) - sizes_BG
    rank_BL = torch.arange(L, device=order_BL.device) - starts_BG.gather(1, sorted_BL)
    kept_BL = rank_BL < counts_BG.gather(1, sorted_BL)
    longest = largest(int(counts_BG.sum(1).max()) if len(counts_BG) else L, counts_BG.device)
    return order_BL.masked_fill(~kept_BL, L).sort(dim=1).values[:, :longest]


def subset_mask(ids_BK: Tensor, length: int) -> Tensor | None:
    """bool [B, K], False = padding; None where there is none."""
    real_BK = ids_BK < length
    return None if bool(real_BK.all()) else real_BK


def keep_tokens(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B, K, D] the tokens ``ids``; padding repeats some token, for others to mask."""
    index_BK = ids_BK.clamp(max=x_BLD.shape[1] - 1)
    return x_BLD.gather(1, index_BK[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def restore_tokens(x_BKD: Tensor, ids_BK: Tensor, length: int, fill_D: Tensor) -> Tensor:
    """[B, L, D]: tokens ``ids`` at their old places, ``fill`` everywhere else."""
    B, _, D = x_BKD.shape
    full = fill_D.to(x_BKD.dtype).expand(B, length + 1, D)
    index = ids_BK[:, :, None].expand(-1, -1, D)
    return full.scatter(1, index, x_BKD)[:, :length]
