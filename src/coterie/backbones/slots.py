"""Expert slots by configuration, and what a network that has them owes its layers.

A slot is a place in a network where an expert layer is put by configuration. Which places there
are, the network says: a trunk has ``pre_block`` and ``ffn`` in every block, a network of another
library has ``conv`` and ``ffn`` where its own convolutions and feed-forward networks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Generator, nn

from coterie.core.config import Config
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.numbers import Few
from coterie.core.routing import Aux, Routing
from coterie.core.tensors import is_borrowed, stands_still
from coterie.experts import (
    ExpertLayer,
    ExpertLayerConfig,
    ExpertPool,
    Router,
    routers_of,
    share_cells,
)
from coterie.experts.balance.base import BalancePart

SlotName = Literal["pre_block", "ffn", "conv"]
Layers = Literal["all", "odd", "even", "except_first"] | tuple[int, ...]


def sites(layers: Layers, depth: int) -> list[int]:
    """Numbers of the places that ``layers`` names among ``depth`` of them."""
    named = {
        "all": range(depth),
        "odd": range(1, depth, 2),
        "even": range(0, depth, 2),
        "except_first": range(1, depth),
    }
    return sorted(layers) if isinstance(layers, tuple) else list(named[layers])


class SlotConfig(Config):
    """One expert system: which slot, in which places, which layer.

    A trunk numbers its blocks. Networks of other libraries name their modules: ``names`` are shell
    patterns of module paths (``*`` also matches dots), and ``layers`` counts what they match.

    ``reuse`` r: r consecutive layers of the slot share one pool, in which each owns
    ``expert.num_experts`` experts; every one of them routes among all r times as many (the last
    pool may be smaller). ``residual`` False: the answer of an ``ffn`` replaces the stream.
    """

    slot: SlotName = "ffn"
    layers: Layers = "all"  # "odd": places 1, 3, 5, ... (every second one)
    names: tuple[str, ...] = ()
    expert: ExpertLayerConfig
    reuse: Few = 1
    residual: bool = True

    @model_validator(mode="after")
    def _check(self) -> SlotConfig:
        if not self.residual and self.slot != "ffn":
            raise ConfigError(describe("residual", False, "true", "only ffn adds to the stream"))
        if not self.residual and self.expert.kind.input_free:
            hint = f"experts of kind {self.expert.kind.kind!r} ignore what the block reads"
            raise ConfigError(describe("residual", False, "true", hint))
        if self.expert.kind.grid != (self.slot == "conv"):
            allowed = "conv" if self.slot == "conv" else "a kind for tokens"
            hint = f"slot {self.slot!r} reads {'grids' if self.slot == 'conv' else 'tokens'}"
            raise ConfigError(describe("expert.experts", self.expert.kind.kind, allowed, hint))
        if self.reuse > 1:
            if self.expert.num_experts is None:
                hint = "a layer of a shared pool owns a number of experts"
                raise ConfigError(describe("expert.num_experts", None, "a number", hint))
            if self.expert.slot_map is not None or self.expert.router.num_reserved:
                hint = "merged and reserved experts belong to one layer"
                raise ConfigError(describe("reuse", self.reuse, "1", hint))
        return self

    def sites(self, depth: int) -> list[int]:
        return sites(self.layers, depth)

    def pooled(self, expert: ExpertLayerConfig, layers: int) -> ExpertLayerConfig:
        """``expert`` where this many layers share a pool: each sees the experts of all."""
        if self.reuse == 1:
            return expert
        assert expert.num_experts is not None
        return expert.replace(num_experts=layers * expert.num_experts)

    def pools(self, depth: int) -> list[tuple[int, ...]]:
        """Layers that share a pool of experts, from the first to the last."""
        return self.grouped(self.sites(depth))

    def grouped(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(layers[i : i + self.reuse]) for i in range(0, len(layers), self.reuse)]


@dataclass(frozen=True)
class Site:
    """A place for one layer: its number in the slot, the experts as they fit there, the sizes of
    what they read and of the time embedding, and the network's own module if that stays."""

    layer: int
    expert: ExpertLayerConfig
    width: int
    time_width: int | None = None
    always: nn.Module | None = None
    name: str = ""
    init_std: float | None = None  # where the experts state none


class System(NamedTuple):
    """Layers whose routings are balanced together."""

    slot: str
    layers: tuple[int, ...]
    balances: list[BalancePart]


class ExpertHost(nn.Module):
    """A network, or a part of one, with expert systems: owns shared pools, balances, updates.

    ``pools`` are the experts that several layers use; other layers own theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList()
        self.owner = object()  # by identity: what the routings of its layers carry
        self._systems: list[System] = []

    def expert_layer(self, slot: str, layer: int) -> ExpertLayer:
        """The layer in one place."""
        raise NotImplementedError

    def expert_layers(self) -> list[ExpertLayer]:
        return [module for module in self.modules() if isinstance(module, ExpertLayer)]

    def build_system(self, slot: SlotConfig, places: Sequence[Site]) -> dict[int, ExpertLayer]:
        """The layers of one configured slot, by number; recurrent routers share their memory."""
        by_layer = {site.layer: site for site in places}
        groups = slot.grouped([site.layer for site in places])
        made: dict[int, ExpertLayer] = {}
        for group in groups:
            made |= zip(group, self._build_group(slot, [by_layer[layer] for layer in group]))
        share_cells(made.values())
        for layer in made.values():
            layer.owner = self.owner
        balances = [part.build() for part in slot.expert.balance]
        for layers in groups if slot.reuse > 1 else [tuple(by_layer)]:
            self._systems.append(System(slot.slot, layers, balances))
        return made

    def _build_group(self, slot: SlotConfig, group: Sequence[Site]) -> list[ExpertLayer]:
        """The expert layers of one pool: an ordinary layer, or several that refer to one pool."""
        if slot.reuse == 1:
            return [
                s.expert.build(s.width, s.time_width, always=s.always, init_std=s.init_std)
                for s in group
            ]
        first, layers = group[0], tuple(site.layer for site in group)
        for site in group:
            if (site.expert.kind, site.width) != (first.expert.kind, first.width):
                hint = f"{first.name} and {site.name} differ in shape"
                raise ConfigError(describe("reuse", slot.reuse, "1", hint))
        wide = slot.pooled(first.expert, len(group))
        pool = wide.starting(first.init_std).build_pool(first.width)
        self.pools.append(pool)
        return [
            wide.build(s.width, s.time_width, pool, layers, s.always, init_std=s.init_std)
            for s in group
        ]

    def reset_experts(self) -> None:
        """Every pool, router and shared expert by the card of its own system.

        They draw from torch's global generator like all else in a network: other weights in every
        layer, and under every seed.
        """
        rng = Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
        for pool in self.pools:
            assert isinstance(pool, ExpertPool)
            pool.reset_parameters(rng)
        for layer in self.expert_layers():
            layer.reset_parameters(rng)

    def owns(self, routing: Routing) -> bool:
        """Whether a layer of this host made it; where it does not say who did, whether one of its
        systems stands in such a place."""
        if routing.owner is not None:
            return routing.owner is self.owner
        return any(_of(system, [routing]) for system in self._systems)

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        """Every configured balance loss of the routings of one forward pass; DataError for those of
        another host, or where training needs a gradient that they do not have."""
        (routings,) = claimed([self], routings)
        out: list[Aux] = []
        for system in self._systems:
            own = _of(system, routings)
            made = [aux for balance in system.balances for aux in balance.losses(own, rng)]
            if made and self.training:
                layers = (self.expert_layer(system.slot, layer) for layer in system.layers)
                require_graph(own, routers_of(layers), system.slot)
            out.extend(made)
        return tuple(out)

    @torch.no_grad()
    def after_step(self, routings: Sequence[Routing]) -> None:
        """Balance by selection bias: reads all routings of one optimiser step, outside forward;
        then what routers themselves change from step to step. What is borrowed or frozen stands
        still. DataError for routings of another host."""
        (routings,) = claimed([self], routings)
        if is_borrowed(self):
            return
        for system in self._systems:
            moving = self._moving(system)
            own = [r for r in _of(system, routings) if (r.layer, r.round) in moving]
            routers = list(moving.values())
            for balance in system.balances:
                balance.after_step(routers, own)
            for router in dict.fromkeys(routers):
                router.after_step()

    def _moving(self, system: System) -> dict[tuple[int, int], Router]:
        """The routers that are not frozen, by (layer, round)."""
        layers = {layer: self.expert_layer(system.slot, layer) for layer in system.layers}
        every = {
            (layer, round): experts.router(round)
            for layer, experts in layers.items()
            for round in range(experts.config.rounds)
        }
        return {place: one for place, one in every.items() if not stands_still(one, self)}


def _of(system: System, routings: Iterable[Routing]) -> list[Routing]:
    return [r for r in routings if r.slot == system.slot and r.layer in system.layers]


def hosts(network: nn.Module) -> list[ExpertHost]:
    """Everything in a network that has expert systems."""
    return [module for module in network.modules() if isinstance(module, ExpertHost)]


def claimed(owners: Sequence[ExpertHost], routings: Sequence[Routing]) -> list[list[Routing]]:
    """The routings of each host; DataError for one that is nobody's among them."""
    for routing in routings:
        if not any(host.owns(routing) for host in owners):
            raise _foreign(routing)
    return [[routing for routing in routings if host.owns(routing)] for host in owners]


def require_graph(routings: Sequence[Routing], routers: Iterable[Router], slot: str) -> None:
    """DataError where routers learn and their routings have no gradient to do it with."""
    if not torch.is_grad_enabled():
        return
    if any(r.gates.requires_grad or r.logits.requires_grad for r in routings):
        return
    if any(parameter.requires_grad for router in routers for parameter in router.parameters()):
        hint = "checkpoint with use_reentrant=False; read detached ones under torch.no_grad()"
        where = f"routings of slot {slot}"
        raise DataError(describe(where, "no graph", "what carries gradients", hint))


def refuse_foreign(routings: Iterable[Routing], owners: Sequence[object]) -> None:
    """DataError for a routing that says it is another's than these."""
    for routing in routings:
        if routing.owner is not None and all(routing.owner is not owner for owner in owners):
            raise _foreign(routing)


def _foreign(routing: Routing) -> DataError:
    where = f"routing of slot {routing.slot}, layer {routing.layer}"
    return DataError(describe(where, "foreign", "what this model's own layers made"))
