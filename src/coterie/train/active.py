"""What a model has in the places of experts, and what it really uses of that for a row, from the
choices that were counted on data.

A selection declares how many experts it takes at most; where the number varies (top-p, expert
choice) only counting tells what a row costs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from coterie.backbones.trunk import Block
from coterie.core.cost import count_parameters
from coterie.experts import ExpertLayer, ExpertPool, multiply_adds
from coterie.inspect import Place, Trace, analyse
from coterie.train.probes import observed, probe_loss
from coterie.train.run import LoadedRun

Sites = Mapping[ExpertLayer, tuple[str, int]]
"""Expert layer -> the slot and the layer it sits in."""


def expert_sites(run: LoadedRun) -> dict[ExpertLayer, tuple[str, int]]:
    """Asked of the model itself, by one small forward pass."""
    with observed(run.model) as seen:
        probe_loss(run, limit=1)
    return {item.layer: (item.routings[0].slot, item.routings[0].layer) for item in seen}


def choices_per_row(trace: Trace) -> dict[Place, float]:
    """Mean number of experts a row uses, by router."""
    return {item.place: item.choices_per_row for item in analyse(trace)}


def slot_parameters(model: nn.Module) -> int:
    """Parameters of all expert layers (routers, pools and what their experts share) and of the
    dense feed-forward networks that stand where such layers could; each counts once."""
    parts: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, ExpertLayer | ExpertPool):  # a pool of several layers is in neither
            parts.append(module)
        elif isinstance(module, Block):
            parts.append(module.ffn)
    return sum({p: p.numel() for part in parts for p in part.parameters()}.values())


def active_parameters(model: nn.Module, sites: Sites, choices: Mapping[Place, float]) -> int:
    """Parameters that take part in the answer for one row: the dense part, and of each pool as
    many experts as its layers and rounds chose on average (a frozen decision counts once)."""
    used: dict[ExpertPool, float] = {}
    for layer, (slot, index) in sites.items():
        rounds = 1 if layer.config.round_routing == "frozen" else layer.config.rounds
        chosen = sum(choices.get(Place(slot, index, r), 0.0) for r in range(rounds))
        used[layer.pool] = used.get(layer.pool, 0.0) + chosen
    measured: dict[nn.Module, dict[str, float]] = {
        pool: dict.fromkeys(pool.names, min(1.0, chosen / pool.num_experts))
        for pool, chosen in used.items()
    }
    return count_parameters(model, measured).active


def expert_multiply_adds(sites: Sites, choices: Mapping[Place, float]) -> float:
    """Of all expert layers for one row: chosen experts, shared experts and routers."""
    total = 0.0
    for layer, (slot, index) in sites.items():
        rounds = range(layer.config.rounds)
        total += multiply_adds(layer, sum(choices.get(Place(slot, index, r), 0.0) for r in rounds))
    return total
