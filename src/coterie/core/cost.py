"""Number of parameters (total and active) and of multiply-adds, computed from shapes alone.

A module that routes has a method ``active_share() -> {parameter name: share}``: the share of that
parameter used for one token. All other parameters count fully.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a model."""

    total: int
    active: int  # those used for one token (or sample)


def count_parameters(
    model: nn.Module, measured: Mapping[nn.Module, Mapping[str, float]] | None = None
) -> Parameters:
    """Count each parameter once (shared tensors too); works on the meta device.

    ``measured``: for some modules, shares by parameter name that replace those of
    ``active_share()``, which are an upper limit where the number of experts per token varies.
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
