"""Expert slots: where a network has expert layers, and which.

A slot is a kind of place for an expert layer. A trunk has ``pre_block`` and ``ffn`` in every block;
a network of another library has ``conv`` and ``ffn`` where its convolutions and feed-forward
networks are.
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
    """The numbers that ``layers`` selects among 0..depth-1."""
    named = {
        "all": range(depth),
        "odd": range(1, depth, 2),
        "even": range(0, depth, 2),
        "except_first": range(1, depth),
    }
    return sorted(layers) if isinstance(layers, tuple) else list(named[layers])


class SlotConfig(Config):
    """Expert layers of one configuration: which slot, in which blocks."""

    slot: SlotName = "ffn"
    """``ffn`` replaces the feed-forward network, ``pre_block`` scales the input of a block,
    ``conv`` adds to a convolution."""
    layers: Layers = "all"
    """Numbers of the blocks, or all, odd, even, except_first. In networks of other libraries,
    numbers of the modules that ``names`` matches."""
    names: tuple[str, ...] = ()
    """Shell patterns of module paths, in networks of other libraries (``*`` also matches dots)."""
    expert: ExpertLayerConfig  # the expert layer
    reuse: Few = 1
    """Number r of consecutive layers that share one pool of experts. Each owns
    ``expert.num_experts`` of them and routes among those of all r (the last pool may be smaller).
    """
    residual: bool = True  # False: the output of an ``ffn`` replaces the stream

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
        """``expert`` for a pool that ``layers`` layers share: each routes among the experts
        of all."""
        if self.reuse == 1:
            return expert
        assert expert.num_experts is not None
        return expert.replace(num_experts=layers * expert.num_experts)

    def pools(self, depth: int) -> list[tuple[int, ...]]:
        """Groups of layers that share a pool of experts, from the first to the last."""
        return self.grouped(self.sites(depth))

    def grouped(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(layers[i : i + self.reuse]) for i in range(0, len(layers), self.reuse)]


@dataclass(frozen=True)
class Site:
    """A place for one expert layer."""

    layer: int  # number in the slot
    expert: ExpertLayerConfig
    width: int  # size of the experts' input
    time_width: int | None = None  # size of the time embedding; None: width
    always: nn.Module | None = None  # the network's own module, if it stays
    name: str = ""
    init_std: float | None = None  # of the network around, for layers that set none


class System(NamedTuple):
    """Expert layers that share balance losses."""

    slot: str
    layers: tuple[int, ...]
    balances: list[BalancePart]


class ExpertHost(nn.Module):
    """A network with expert layers: it owns shared pools, balance losses and their updates.

    ``pools`` holds pools that several layers share; other layers own theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList()
        self.owner = object()  # by identity: what the routings of its layers carry
        self._systems: list[System] = []

    def expert_layer(self, slot: str, layer: int) -> ExpertLayer:
        """The expert layer of a slot in one block."""
        raise NotImplementedError

    def expert_layers(self) -> list[ExpertLayer]:
        return [module for module in self.modules() if isinstance(module, ExpertLayer)]

    def build_system(self, slot: SlotConfig, places: Sequence[Site]) -> dict[int, ExpertLayer]:
        """The layers of one configured slot, by number. Recurrent routers share their cell."""
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
        """Initialise every pool, router and shared expert by its own configuration.

        Uses torch's global generator, like the rest of the network.
        """
        rng = Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
        for pool in self.pools:
            assert isinstance(pool, ExpertPool)
            pool.reset_parameters(rng)
        for layer in self.expert_layers():
            layer.reset_parameters(rng)

    def owns(self, routing: Routing) -> bool:
        """Whether a layer of this network made the routing. If the routing has no owner, whether
        this network has a layer in that slot and block."""
        if routing.owner is not None:
            return routing.owner is self.owner
        return any(_of(system, [routing]) for system in self._systems)

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        """All balance losses of the routings of one forward pass.

        DataError for routings of another network, or without the gradient that training needs.
        """
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
        """Update selection biases and other router buffers, given all routings of an optimiser
        step.

        Borrowed and frozen parts do not change. DataError for routings of another network.
        """
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
    """All parts of a network that have expert layers."""
    return [module for module in network.modules() if isinstance(module, ExpertHost)]


def claimed(owners: Sequence[ExpertHost], routings: Sequence[Routing]) -> list[list[Routing]]:
    """The routings of each host; DataError for a routing of none of them."""
    for routing in routings:
        if not any(host.owns(routing) for host in owners):
            raise _foreign(routing)
    return [[routing for routing in routings if host.owns(routing)] for host in owners]


def require_graph(routings: Sequence[Routing], routers: Iterable[Router], slot: str) -> None:
    """DataError if routers are trained but their routings carry no gradient."""
    if not torch.is_grad_enabled():
        return
    if any(r.gates.requires_grad or r.logits.requires_grad for r in routings):
        return
    if any(parameter.requires_grad for router in routers for parameter in router.parameters()):
        hint = "checkpoint with use_reentrant=False; read detached ones under torch.no_grad()"
        where = f"routings of slot {slot}"
        raise DataError(describe(where, "no graph", "what carries gradients", hint))


def refuse_foreign(routings: Iterable[Routing], owners: Sequence[object]) -> None:
    """DataError for a routing whose owner is not among ``owners``."""
    for routing in routings:
        if routing.owner is not None and all(routing.owner is not owner for owner in owners):
            raise _foreign(routing)


def _foreign(routing: Routing) -> DataError:
    where = f"routing of slot {routing.slot}, layer {routing.layer}"
    return DataError(describe(where, "foreign", "what this model's own layers made"))
