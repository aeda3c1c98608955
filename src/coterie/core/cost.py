"""Counting: parameters (total and active) and multiply-adds, from shapes alone.

A module that routes declares ``active_share() -> {parameter name: share}`` (share of that
parameter used for one token); everything else counts fully.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parameters:
    """``active``: parameters that take part in the answer for one unit."""

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Count each parameter once (shared tensors too); works on the meta device."""
    shares: dict[int, float] = {}
    for module in model.modules():
        declare = getattr(module, "active_share", None)
        if declare is None:
            continue
        own = dict(module.named_parameters())
        for name, share in declare().items():
            shares[id(own[name])] = share
    total = active = 0.0
    for parameter in model.parameters():
        total += parameter.numel()
        active += parameter.numel() * shares.get(id(parameter), 1.0)
    return Parameters(total=int(total), active=round(active))
