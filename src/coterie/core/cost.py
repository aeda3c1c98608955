"""Counting: parameters (total and active) and multiply-adds, from shapes alone.

A module that routes declares ``active_share() -> {parameter name: share}`` (share of that
parameter used for one token); everything else counts fully.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parameters:
    """``active``: parameters that take part in the answer for one unit."""

    total: int
    active: int


def count_parameters(
    model: nn.Module, measured: Mapping[nn.Module, Mapping[str, float]] | None = None
) -> Parameters:
    """Count each parameter once (shared tensors too); works on the meta device.

    ``measured``: shares of some modules in place of what they declare, which is an upper limit
    where the number of experts varies; or of modules that declare nothing.
    """
    measured = measured or {}
    shares: dict[int, float] = {}
    for module in model.modules():
        declare = getattr(module, "active_share", dict)
        declared = measured[module] if module in measured else declare()
        if not declared:
            continue
        own = dict(module.named_parameters())
        for name, share in declared.items():
            shares[id(own[name])] = share
    total = active = 0.0
    for parameter in model.parameters():
        total += parameter.numel()
        active += parameter.numel() * shares.get(id(parameter), 1.0)
    return Parameters(total=int(total), active=round(active))
