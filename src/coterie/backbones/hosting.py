"""Experts inside a network of another library, added to its own modules.

    y = own(x) + sum_e g_e expert_e(x),        expert_e(x) = 0 at the start

At the start the network computes the same as before, whatever the router; replacing the module by
copies of it would need gates that add up to one. The router's gradient is zero in the first step,
because the experts' output is, but not in the next. A convolution and its experts are computed as
one convolution with the kernel ``W + sum_e g_e W_e`` of each sample.

An expert slot replaces a module of the network, whose code passes no Context. The slot reads the
Context from the :mod:`.scope` around the call, and appends its routings there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from coterie.backbones import scope
from coterie.backbones.slots import ExpertHost, Site, SlotConfig
from coterie.core.errors import ConfigError, DataError, describe
from coterie.experts import ExpertLayer, ExpertPool
from coterie.experts.kinds import Conv
from coterie.experts.layer_limits import TRUNK_ONLY

STAGES = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
"""Children of a U-Net in the order in which data pass them; others count as the middle."""


class ExpertSlot(nn.Module):
    """Replaces a module of a network: the module itself (``experts.shared``) plus experts.

    ``forward(x) -> y`` as the module had it: [B, C, H, W] for ``conv``, [B, N, D] for ``ffn``.
    """

    def __init__(self, slot: str, layer: int, name: str, experts: ExpertLayer) -> None:
        super().__init__()
        self.slot, self.layer, self.name = slot, layer, name
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        call = scope.current()
        if call is None:
            hint = "call its network through the host; gradient checkpointing calls it again alone"
            raise DataError(f"expert slot {self.name}: no context; {hint}")
        if x.shape[0] != call.ctx.batch:
            allowed = f"{call.ctx.batch} rows, the samples of the context"
            raise DataError(describe(f"expert slot {self.name}", tuple(x.shape), allowed))
        ctx = call.ctx.replace(
            slot=self.slot,
            layer=self.layer,
            name=self.name,
            tokens=x.shape[1],
            positions=None,
            state=call.states.get(self.slot),
        )
        answer = self.experts(x, ctx)
        scope.record(call, answer.routings)
        if answer.state is not None:
            call.states[self.slot] = answer.state
        y: Tensor = answer.y
        return y

    def extra_repr(self) -> str:
        return f"{self.slot} {self.layer}: {self.name}"


@dataclass(frozen=True, eq=False)
class Place:
    """A module that can have experts, and all paths that lead to it."""

    module: nn.Module
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """A short unique name: ``down.1.0.conv2`` for ``down_blocks.1.resnets.0.conv2``."""
        first, *rest = self.paths[0].split(".")
        first = first.removesuffix("s").removesuffix("_block")
        return ".".join([first, *(part for part in rest if part != "resnets")])


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module is a feed-forward network [..., D] -> [..., D], as diffusers names them."""
    return type(module).__name__ == "FeedForward"


FITS: dict[str, Callable[[nn.Module], bool]] = {
    "conv": lambda module: isinstance(module, nn.Conv2d),
    "ffn": is_feed_forward,
}
"""Slot -> which modules can be one."""


def places(network: nn.Module, slot: str) -> list[Place]:
    """All modules that this kind of slot can replace, in running order.

    Modules inside an expert slot are left out.
    """
    inside = {
        id(part)
        for owner in network.modules()
        if isinstance(owner, ExpertSlot | ExpertLayer)
        for part in owner.modules()
    }
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        if path and FITS[slot](module) and id(module) not in inside:
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    found = [Place(modules[key], tuple(names)) for key, names in paths.items()]
    return sorted(found, key=lambda place: _stage(place.paths[0]))  # stable


def _stage(path: str) -> float:
    first = path.split(".")[0]
    return STAGES.index(first) if first in STAGES else STAGES.index("mid_block")


def select(network: nn.Module, slot: SlotConfig) -> list[Place]:
    """The modules that a slot configuration names; ConfigError if a pattern matches none."""
    there = places(network, slot.slot)
    for pattern in slot.names:
        if not any(fnmatchcase(path, pattern) for place in there for path in place.paths):
            some = ", ".join(place.paths[0] for place in there[:6]) or "none in this network"
            more = f" and {len(there) - 6} more" if len(there) > 6 else ""
            raise ConfigError(describe("names", pattern, f"{some}{more}", f"slot {slot.slot!r}"))
    matched = [
        place
        for place in there
        if any(fnmatchcase(path, pattern) for path in place.paths for pattern in slot.names)
    ]
    if matched and not slot.sites(len(matched)):
        allowed = f"one or more of {list(range(len(matched)))}"
        raise ConfigError(describe("layers", slot.layers, allowed))
    for number in slot.sites(len(matched)):
        if not 0 <= number < len(matched):
            raise ConfigError(describe("layers", number, f"0..{len(matched) - 1}, what is named"))
    return [matched[number] for number in slot.sites(len(matched))]


def check_slot(slot: SlotConfig) -> None:
    """ConfigError if a slot uses features that only a trunk has, or experts that cannot start at
    zero."""
    expert = slot.expert
    if slot.slot not in FITS:
        raise ConfigError(describe("slot", slot.slot, " or ".join(FITS), "it belongs to a trunk"))
    if not slot.names:
        hint = "the network numbers no blocks"
        raise ConfigError(describe("names", slot.names, "patterns of module names", hint))
    if not slot.residual:
        raise ConfigError(describe("residual", False, "true", "the network adds by itself"))
    if not expert.kind.ends:
        hint = f"experts of kind {expert.kind.kind!r} cannot start at zero"
        raise ConfigError(describe("expert.experts", expert.kind.kind, "conv or a network", hint))
    if expert.router_reads != "input":
        allowed, reads = "input", expert.router_reads
        raise ConfigError(describe("expert.router_reads", reads, allowed, TRUNK_ONLY))
    once = {"shared": None, "rounds": 1, "answer": "delta"}
    for name, value in once.items():
        if getattr(expert, name) != value:
            hint = "the network's own module is always on, once, and answers beside the experts"
            raise ConfigError(describe(f"expert.{name}", getattr(expert, name), str(value), hint))


class NetworkHost(ExpertHost):
    """A network of another library with expert slots.

    ``time_width``: size of ``ctx.time_embedding`` in its slots.
    """

    def __init__(
        self, network: nn.Module, slots: Sequence[SlotConfig], time_width: int | None
    ) -> None:
        super().__init__()
        self.network = network
        chosen = [(slot, self._chosen(slot)) for slot in slots]
        numbers = self._numbers(chosen)
        made: list[ExpertSlot] = []
        for slot, named in chosen:
            sites = [_site(slot, place, numbers[id(place.module)], time_width) for place in named]
            for place, site, layer in zip(named, sites, self.build_system(slot, sites).values()):
                made.append(ExpertSlot(slot.slot, site.layer, site.name, layer))
                self._put(place, made[-1])
        self.reset_experts()
        for pool in (*self.pools, *(slot.experts.pool for slot in made)):
            assert isinstance(pool, ExpertPool)
            pool.silence()

    def _chosen(self, slot: SlotConfig) -> list[Place]:
        check_slot(slot)
        return select(self.network, slot)

    def _numbers(self, chosen: Sequence[tuple[SlotConfig, list[Place]]]) -> dict[int, int]:
        """id of a module -> its number among the chosen ones of its slot, in passing order."""
        taken: dict[int, str] = {}
        for slot, named in chosen:
            for place in named:
                if id(place.module) in taken:
                    hint = "one expert system per place"
                    raise ConfigError(describe("names", place.paths[0], "named once", hint))
                taken[id(place.module)] = slot.slot
        out: dict[int, int] = {}
        for name in dict.fromkeys(taken.values()):
            own = [p for p in places(self.network, name) if taken.get(id(p.module)) == name]
            out |= {id(place.module): number for number, place in enumerate(own)}
        return out

    def _put(self, place: Place, slot: ExpertSlot) -> None:
        like = next(place.module.parameters())
        for part in (slot.experts, slot.experts.pool):  # a shared pool is no part of its layers
            part.to(device=like.device, dtype=like.dtype)
        for path in place.paths:
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, slot)

    def detach(self) -> nn.Module:
        """Put the network's own modules back and return it."""
        for parent in list(self.network.modules()):
            for name, child in list(parent._modules.items()):  # also under a second name
                if isinstance(child, ExpertSlot):
                    setattr(parent, name, child.experts.shared)
        self._systems.clear()
        return self.network

    def slots(self) -> list[ExpertSlot]:
        """All expert slots, by kind and then in running order."""
        found = [module for module in self.network.modules() if isinstance(module, ExpertSlot)]
        return sorted(found, key=lambda item: (item.slot, item.layer))

    def expert_layer(self, slot: str, layer: int) -> ExpertLayer:
        return {(item.slot, item.layer): item.experts for item in self.slots()}[slot, layer]


def _site(slot: SlotConfig, place: Place, layer: int, time_width: int | None) -> Site:
    expert, module = slot.expert, place.module
    if isinstance(module, nn.Conv2d):
        assert isinstance(expert.kind, Conv)
        try:
            kind = expert.kind.like(module)
        except ConfigError as error:
            raise ConfigError(f"slot conv at {place.paths[0]}: {error}") from None
        expert, width = expert.replace(experts=kind), module.in_channels
    else:
        width = next(part.in_features for part in module.modules() if isinstance(part, nn.Linear))
    return Site(layer, expert, width, time_width, module, place.name)


def zero(*modules: nn.Module) -> None:
    """Zero all parameters of ``modules``, the last ones of a branch, so that it returns 0."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
