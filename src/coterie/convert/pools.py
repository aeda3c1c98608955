"""Layers that share a pool of experts made from layers that do not, and back (ReXMoE).

``untie``: every layer gets a copy of all experts it may use, for engines that know no shared pools.
``extend_reuse``: the layers of a trained model lend each other their experts. Both keep what the
model computes. Source of the mechanism: arXiv:2510.17483; the conversions are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coterie.backbones import SlotConfig
from coterie.convert.model import built_like, carry, trunk_of, with_slots
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.tensors import assign, module_tensors
from coterie.experts import ExpertLayer, RouterConfig
from coterie.experts.routers import OpeningCandidates
from coterie.experts.routers.edits import Opening

ROW_WISE = ("top_k", "top_p", "random", "rank", "dense")
"""Selections that closed candidates leave as they are."""
CLOSING = ("candidates", "progressive", "opening")


def untied_config(model: Part) -> Part:
    """The model's configuration without shared pools: one slot for the layers of each pool.

    Edits that open a pool step by step are dropped: everything is open. ConfigError: nothing is
    shared, or layers are kept to their own experts (then ``reuse`` 1 says the same).
    """
    trunk = trunk_of(model)
    if all(slot.reuse == 1 for slot in trunk.slots):
        raise ConfigError(describe("slots", "reuse = 1", "a slot with a shared pool"))
    return with_slots(model, [part for slot in trunk.slots for part in _apart(slot, trunk.depth)])


def _apart(slot: SlotConfig, depth: int) -> list[SlotConfig]:
    """One slot for each pool, in which each layer owns all of the pool's experts."""
    if slot.reuse == 1:
        return [slot]
    router, each = slot.expert.router, slot.expert.num_experts
    assert each is not None
    if any(edit.kind == "candidates" for edit in router.edits):
        hint = "which candidates are open depends on the layer"
        raise ConfigError(describe("edits", "candidates", "edits that close none", hint))
    edits = tuple(edit for edit in router.edits if edit.kind != "progressive")
    plain = slot.expert.replace(router=router.replace(edits=edits))
    return [
        slot.replace(layers=group, reuse=1, expert=plain.replace(num_experts=len(group) * each))
        for group in slot.pools(depth)
    ]


def untie(model: Any) -> tuple[Part, Any]:
    """``(configuration, model)`` without shared pools, with the same output."""
    changed = untied_config(model.config)
    built = _rebuilt(model, changed)
    trunk = trunk_of(model.config)
    for slot in trunk.slots:
        for place in slot.sites(trunk.depth):
            old, new = _layer(model, slot.slot, place), _layer(built, slot.slot, place)
            assign(new.pool.tensors(), old.pool.tensors(), f"{slot.slot} {place}: experts")
            assign(_beside_pool(new), _beside_pool(old), f"{slot.slot} {place}")
    return changed, built


def extended_config(model: Part, reuse: int, begin: int = 0, end: int = 1000) -> Part:
    """The model's configuration with pools of ``reuse`` layers, whose experts of other layers open
    between the optimiser steps ``begin`` and ``end``.

    ConfigError: pools are shared already, or a router depends on how many candidates there are.
    """
    if not 0 <= begin < end:
        raise ConfigError(describe("begin", begin, f"0..{end - 1}, before end = {end}"))
    opening = OpeningCandidates(steps=end - begin)
    trunk = trunk_of(model)
    if not trunk.slots:
        raise ConfigError(describe("slots", (), "a model with experts"))
    slots = []
    for slot in trunk.slots:
        _check_extendable(slot)
        router = slot.expert.router
        wider = router.replace(edits=(*router.edits, opening))
        slots.append(slot.replace(reuse=reuse, expert=slot.expert.replace(router=wider)))
    return with_slots(model, slots)


def _check_extendable(slot: SlotConfig) -> None:
    router: RouterConfig = slot.expert.router
    if slot.reuse > 1:
        raise ConfigError(describe("slots.reuse", slot.reuse, "1", "untie the model first"))
    if router.select.kind not in ROW_WISE:
        hint = "its choice depends on the number of candidates"
        raise ConfigError(describe("select", router.select.kind, ", ".join(ROW_WISE), hint))
    if not router.score_part.learned:
        raise ConfigError(describe("score", router.score.kind, "a learned score"))
    for edit in router.edits:
        if edit.kind in CLOSING:
            hint = "it says which candidates are open"
            raise ConfigError(describe("edits", edit.kind, "other edits", hint))


@torch.no_grad()
def extend_reuse(model: Any, reuse: int, begin: int = 0, end: int = 1000) -> tuple[Part, Any]:
    """``(configuration, model)`` whose layers share pools of ``reuse`` layers' experts.

    At first a layer uses its own experts only: the others have probability 0, in training and in
    evaluation, and the output is that of ``model``. After optimiser step ``begin`` their odds grow
    from 0 to full weight at ``end``; that share is part of the router's state. A router's row for
    an expert of another layer starts as that of its owner's router.
    """
    changed = extended_config(model.config, reuse, begin, end)
    built = _rebuilt(model, changed)
    depth = trunk_of(changed).depth
    for slot in trunk_of(changed).slots:
        for group in slot.pools(depth):
            lent = [_layer(model, slot.slot, place) for place in group]
            stacks = [layer.pool.tensors() for layer in lent]
            joint = {name: torch.cat([s[name] for s in stacks]) for name in stacks[0]}
            for number, place in enumerate(group):
                new = _layer(built, slot.slot, place)
                assign(new.pool.tensors(), joint, f"pool of layers {group}")
                _widen(new, lent, number, -begin / (end - begin))
    return changed, built


def _widen(new: ExpertLayer, lent: Sequence[ExpertLayer], own: int, share: float) -> None:
    """Give a layer the routers and shared experts of the plain one, with rows for all of ``lent``;
    those of others closed."""
    plain = [_beside_pool(layer) for layer in lent]
    values = dict(_openings(new))
    for name, target in values.items():
        each = len(target) // len(lent)
        values[name] = torch.full_like(target, share)
        values[name][own * each : (own + 1) * each] = 1.0
    count = lent[own].router(0).num_experts
    for name, value in plain[own].items():
        if _beside_pool(new)[name].shape != value.shape:  # one row, or more, for each candidate
            blocks = [tensors[name].unflatten(0, (-1, count)) for tensors in plain]
            value = torch.cat(blocks, dim=1).flatten(0, 1)
        values[name] = value
    assign(_beside_pool(new), values, "layer of a pool")


def _openings(layer: ExpertLayer) -> Mapping[str, Tensor]:
    """The state of the edits that open candidates, by name in the layer."""
    return {
        f"{name}.share": module.share
        for name, module in layer.named_modules()
        if isinstance(module, Opening)
    }


def _beside_pool(layer: ExpertLayer) -> dict[str, Tensor]:
    """Routers and shared experts."""
    named = module_tensors(layer).items()
    return {name: value for name, value in named if not name.startswith("pool.")}


def _rebuilt(model: Any, config: Part) -> Any:
    """A model of ``config`` with all tensors of ``model`` outside the expert layers."""
    built = built_like(config, model)
    trunk = trunk_of(model.config)
    places = [(slot.slot, i) for slot in trunk.slots for i in slot.sites(trunk.depth)]
    layers = [f"backbone.trunk.blocks.{place}.{slot}." for slot, place in places]
    carry(model, built, ["backbone.trunk.pools.", *layers])
    return built.train(model.training)


def _layer(model: nn.Module, slot: str, place: int) -> ExpertLayer:
    blocks = cast(Any, model).backbone.trunk.blocks
    return cast(ExpertLayer, getattr(blocks[place], slot))
