"""Checks that expert layers fit their slots, and that their routers get the inputs they need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

from coterie.backbones.slots import SlotConfig
from coterie.core.errors import ConfigError, describe
from coterie.experts.routers.config import within


def check_slots(
    slots: Sequence[SlotConfig], width: int, depth: int, causal: bool, modulation: str
) -> None:
    """ConfigError if an expert layer does not fit this trunk, or two slots collide."""
    taken: dict[tuple[str, int], int] = {}
    states: dict[str, tuple[str, int]] = {}
    for index, slot in enumerate(slots):
        within(f"slots.{index}", partial(_check_slot, slot, width, depth, causal, modulation))
        for layer in slot.sites(depth):
            if (slot.slot, layer) in taken:
                hint = f"slots.{taken[slot.slot, layer]} has it"
                allowed = "one expert system per slot and block"
                raise ConfigError(describe(f"slots.{index}.layers", layer, allowed, hint))
            taken[slot.slot, layer] = index
        router = slot.expert.router
        own = (router.routed_unit, router.score_part.state_size)
        known = states.setdefault(slot.slot, own) if own[1] else own
        if own != known:
            hint = "the state travels through all layers of a slot"
            allowed = f"{known[1]} values per {known[0]}, as in the systems before"
            where = f"slots.{index}.expert.router.score.state"
            raise ConfigError(describe(where, own[1], allowed, hint))


def _check_slot(slot: SlotConfig, width: int, depth: int, causal: bool, modulation: str) -> None:
    if slot.slot == "conv" or slot.names:
        field, value = ("slot", "conv") if slot.slot == "conv" else ("names", slot.names)
        hint = "a trunk has numbered blocks and no convolutions; see the backbone unet"
        allowed = "pre_block or ffn" if field == "slot" else "none; use layers"
        raise ConfigError(describe(field, value, allowed, hint))
    if causal and slot.expert.router.batchwide:
        hint = "experts that choose among all tokens of a sample see the future"
        value = slot.expert.router.select.kind
        raise ConfigError(describe("expert.router.select", value, "a row-wise selection", hint))
    own = slot.sites(depth)
    if not own:
        raise ConfigError(describe("layers", slot.layers, f"one or more of {list(range(depth))}"))
    for layer in own:
        if not 0 <= layer < depth:
            hint = f"the trunk has depth {depth}"
            raise ConfigError(describe("layers", layer, f"blocks 0..{depth - 1}", hint))
    if slot.reuse > max(1, len(own)):
        hint = f"the slot has {len(own)} layers"
        raise ConfigError(describe("reuse", slot.reuse, f"1..{len(own)}", hint))
    answers = slot.expert.kind.output_shape((width,))
    if answers != (width,):
        allowed = f"experts that answer {width} values"
        raise ConfigError(describe("expert.experts", f"{answers[0]} values", allowed))
    if not slot.residual and modulation == "adaln_zero":
        hint = "the gate starts at zero, and nothing would pass"
        raise ConfigError(describe("residual", False, "true", hint))
    for size in {len(group) for group in slot.pools(depth)}:
        within("expert", partial(slot.pooled(slot.expert, size).check, width))


def check_told(
    slots: Sequence[SlotConfig], told: Collection[str], teller: str = "this backbone"
) -> None:
    """ConfigError if a router needs a Context field that the backbone does not set."""
    for index, slot in enumerate(slots):
        for field, value, names in slot.expert.reads:
            missing = [name for name in names if name not in told]
            if missing:
                where = f"slots.{index}.expert.{field}"
                hint = f"{teller} tells routers no {' or '.join(missing)}"
                allowed = f"what reads {', '.join(sorted(told))} or the rows"
                raise ConfigError(describe(where, value, allowed, hint))
