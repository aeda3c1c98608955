"""Whether adapters can be added up, and how much they overlap.

Legend: r rank, I inputs, O outputs; A_i = down_i [r, I], dW_i = scale up_i A_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from coterie.adapters.basis import BasisConfig, capacity
from coterie.adapters.config import LoraConfig
from coterie.adapters.layers import LowRank, Part
from coterie.core.errors import ConfigError, describe


def check_together(configs: Mapping[str, LoraConfig]) -> None:
    """ConfigError if two adapters have different bases, or the same slot of one.

    Adapters without a basis go with any.
    """
    placed = [(name, c, c.basis) for name, c in configs.items() if c.basis is not None]
    for (first, one, basis), (second, other, another) in combinations(placed, 2):
        if basis.hash != another.hash:
            hint = f"{first!r} has basis {basis.hash}, {second!r} {another.hash}"
            allowed = "one basis (kind, seed and side) for adapters that are added up"
            raise ConfigError(describe(f"{second}.basis", another.hash, allowed, hint))
        if _overlap(basis, one.rank, another, other.rank):
            hint = f"it shares directions with {first!r}, slot {basis.index} of rank {one.rank}"
            raise ConfigError(describe(f"{second}.basis.index", another.index, "a free slot", hint))


def _overlap(one: BasisConfig, rank: int, other: BasisConfig, other_rank: int) -> bool:
    if one.kind == "gaussian":
        return one.index == other.index
    return (
        one.index * rank < (other.index + 1) * other_rank
        and other.index * other_rank < (one.index + 1) * rank
    )


@dataclass(frozen=True)
class Pair:
    """Overlap of two adapters: means over the modules that both change. Norms are Frobenius
    norms."""

    first: str
    second: str
    modules: int
    overlap: float  # |A_i A_j^T| / (|A_i| |A_j|); 0: they read different input directions
    update_overlap: float  # |dW_i dW_j^T| / (|dW_i| |dW_j|)
    cosine: float  # of the two updates


def pairs(adapters: Mapping[str, Mapping[str, Part]]) -> list[Pair]:
    """Every pair of adapters that change the same modules."""
    out = []
    for first, second in combinations(adapters, 2):
        shared = [
            (one, other)
            for path, one in adapters[first].items()
            if isinstance(one, LowRank) and isinstance(other := adapters[second].get(path), LowRank)
        ]
        if shared:
            rows = torch.tensor([_overlaps(one, other) for one, other in shared])
            out.append(Pair(first, second, len(shared), *rows.mean(0).tolist()))
    return out


@torch.no_grad()
def _overlaps(one: LowRank, other: LowRank) -> tuple[float, float, float]:
    a, b = one.down.float(), other.down.float()
    u, v = one.delta().flatten(1), other.delta().flatten(1)
    update = _share(u @ v.T, u, v)
    inner = (u * v).sum().abs()
    return _share(a @ b.T, a, b), update, float(inner / (u.norm() * v.norm()).clamp_min(1e-30))


def _share(product: Tensor, a: Tensor, b: Tensor) -> float:
    return float(product.norm() / (a.norm() * b.norm()).clamp_min(1e-30))


def room(parts: Mapping[str, Part]) -> int | None:
    """How many adapters of this rank fit side by side in the narrowest module; None: any number."""
    limits = []
    for part in parts.values():
        if isinstance(part, LowRank) and part.config.basis is not None:
            side = part.config.basis.side
            width = part.down.shape[1] if side == "input" else part.up.shape[0]
            limits.append(capacity(part.config.basis, width, part.config.rank))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None
