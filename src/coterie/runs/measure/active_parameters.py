"""Parameters of expert layers, and how many a row really uses, from choices counted on data.

A selection declares the most experts it takes; where the number varies (top-p, expert choice) it
has to be counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from coterie.backbones.trunk import Block
from coterie.core.cost import count_parameters
from coterie.core.routing import ENSEMBLE
from coterie.ensembles import Ensemble
from coterie.experts import ExpertLayer, ExpertPool, multiply_adds
from coterie.inspect import Place, Trace, analyse
from coterie.runs.measure.routing_probes import observed, probe_loss
from coterie.runs.trained_run import LoadedRun

Sites = Mapping[ExpertLayer, tuple[str, int]]
"""Expert layer -> the slot and the layer it sits in."""


def expert_sites(run: LoadedRun) -> dict[ExpertLayer, tuple[str, int]]:
    """Asked of the model itself, by one small forward pass; slots of an ensemble's members begin
    with the member's name, as in its routings."""
    with observed(run.model) as seen:
        probe_loss(run, limit=1)
    owner = {
        module: f"{name}/" for name, network in networks(run.model) for module in network.modules()
    }
    return {
        item.layer: (owner.get(item.layer, "") + item.routings[0].slot, item.routings[0].layer)
        for item in seen
    }


def networks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Members of an ensemble that are in memory, by name; [] of any other model."""
    if not isinstance(model, Ensemble):
        return []
    there = [facts.name for facts in model.members.facts if not facts.missing]
    return list(zip(there, model.networks, strict=False))


def member_shares(model: nn.Module, trace: Trace) -> dict[nn.Module, float]:
    """How often each member of an ensemble is asked, per row."""
    if not isinstance(model, Ensemble):
        return {}
    asked = next((item for item in analyse(trace) if item.place.slot == ENSEMBLE), None)
    if asked is None:
        return {}
    index = {name: at for at, name in enumerate(model.members.names)}
    return {
        network: float(asked.load[index[name]] * asked.choices_per_row)
        for name, network in networks(model)
    }


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


def active_parameters(
    model: nn.Module,
    sites: Sites,
    choices: Mapping[Place, float],
    asked: Mapping[nn.Module, float] | None = None,
) -> int:
    """Parameters that take part in the answer for one row: the dense part, and of each pool as
    many experts as its layers and rounds chose on average (a frozen decision counts once).
    ``asked``: modules that not every row goes through, and how often one does."""
    used: dict[ExpertPool, float] = {}
    for layer, (slot, index) in sites.items():
        rounds = 1 if layer.config.round_routing == "frozen" else layer.config.rounds
        chosen = sum(choices.get(Place(slot, index, r), 0.0) for r in range(rounds))
        used[layer.pool] = used.get(layer.pool, 0.0) + chosen
    measured: dict[nn.Module, dict[str, float]] = {
        pool: dict.fromkeys(pool.names, min(1.0, chosen / pool.num_experts))
        for pool, chosen in used.items()
    }
    active: float = count_parameters(model, measured).active
    for module, share in (asked or {}).items():
        active -= (1.0 - min(1.0, share)) * count_parameters(module, measured).active
    return round(active)


def expert_multiply_adds(sites: Sites, choices: Mapping[Place, float]) -> float:
    """Of all expert layers for one row: chosen experts, shared experts and routers."""
    total = 0.0
    for layer, (slot, index) in sites.items():
        rounds = range(layer.config.rounds)
        total += multiply_adds(layer, sum(choices.get(Place(slot, index, r), 0.0) for r in rounds))
    return total
