"""Upcycling a model of the library: the dense blocks of its trunk become expert slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from coterie.backbones import SlotConfig, TrunkConfig
from coterie.convert.config import UpcycleConfig
from coterie.convert.weights import copy, cut, router_rows
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.rng import generator
from coterie.core.tensors import assign, module_tensors
from coterie.experts import EXPERTS, ExpertLayer

KINDS = {"gelu": "gelu_mlp", "swiglu": "swiglu"}
"""``TrunkConfig.mlp`` -> the kind of expert with the same function."""
Counted = Callable[[int, tuple[int, int]], Tensor | None]
"""Which network, and samples and tokens of what it is given -> bool [samples * tokens]."""
MAX_ROWS = 8192  # inputs of a network that are kept to balance its router


def upcycled_config(model: Part, config: UpcycleConfig) -> Part:
    """The model's configuration with expert slots in the place of its dense networks.

    ConfigError: no trunk, blocks that do not exist or hold experts already, slices that do not
    divide the inner size.
    """
    trunk = trunk_of(model)
    slot = upcycled_slot(trunk, config)
    _check_blocks(slot, trunk)
    return with_slots(model, [*trunk.slots, slot])


def trunk_of(model: Part) -> TrunkConfig:
    """The trunk of a model's configuration; ConfigError where there is none."""
    trunk = getattr(getattr(model, "backbone", None), "trunk", None)
    if not isinstance(trunk, TrunkConfig):
        raise ConfigError(describe("model", model.kind, "a model with a transformer trunk"))
    return trunk


def with_slots(model: Part, slots: Sequence[SlotConfig]) -> Part:
    """The model's configuration with other expert slots."""
    trunk = trunk_of(model).replace(slots=tuple(slots))
    changed: Part = model.replace(backbone=model.backbone.replace(trunk=trunk))
    return changed


def upcycled_slot(trunk: TrunkConfig, config: UpcycleConfig) -> SlotConfig:
    """The slot that takes the place of the trunk's dense feed-forward networks."""
    kind = EXPERTS.parse(KINDS[trunk.mlp])
    return SlotConfig(slot="ffn", layers=config.layers, expert=config.layer(kind, trunk.hidden))


def _check_blocks(slot: SlotConfig, trunk: TrunkConfig) -> None:
    taken = {
        layer for other in trunk.slots if other.slot == "ffn" for layer in other.sites(trunk.depth)
    }
    dense = [layer for layer in range(trunk.depth) if layer not in taken]
    wanted = slot.sites(trunk.depth)
    for layer in wanted:
        if layer not in dense:
            why = f"block {layer} holds experts already" if layer in taken else "no such block"
            raise ConfigError(describe("layers", slot.layers, f"dense blocks of {dense}", why))
    if not wanted:
        raise ConfigError(describe("layers", slot.layers, f"one or more of {dense}"))


def upcycle(
    model: Any,
    config: UpcycleConfig,
    run: Callable[[nn.Module], object] | None = None,
    rng: Generator | None = None,
) -> tuple[Part, Any]:
    """``(configuration, model)`` with experts, from a dense model of the library; see
    :mod:`coterie.convert.config`.

    ``run(model)`` passes real inputs through the dense model, once or several times; what its
    feed-forward networks are given there balances the router. None: random rows. ``rng`` draws rows
    and noise (default: from ``config.seed``). All other tensors are carried over as they are.
    """
    rng = rng or generator(config.seed, "upcycle")
    changed = upcycled_config(model.config, config)
    built = built_like(changed, model)
    trunk = model.config.backbone.trunk
    sites = upcycled_slot(trunk, config).sites(trunk.depth)
    dense = {place: model.backbone.trunk.blocks[place].ffn for place in sites}
    inputs: Mapping[int, Tensor] = {}
    if run is not None and config.calibration:
        inputs = feed_forward_inputs(dense, lambda: run(model))
    carry(model, built, [f"backbone.trunk.blocks.{place}.ffn." for place in sites])
    for place, network in dense.items():
        layer = built.backbone.trunk.blocks[place].ffn
        names = layer.pool.kind.plain_names()
        tensors = {name: network.get_parameter(plain) for name, plain in names.items()}
        convert_block(layer, tensors, config, rng, inputs.get(place))
    return changed, built.train(model.training)


def built_like(config: Part, model: nn.Module) -> Any:
    """A new model on the device and in the type of ``model``; its weights are of no use yet."""
    with torch.random.fork_rng(devices=[]):
        built: nn.Module = config.build()
    parameter = next(model.parameters())
    return built.to(device=parameter.device, dtype=parameter.dtype)


def carry(model: nn.Module, built: nn.Module, replaced: list[str]) -> None:
    """Copy every tensor outside the replaced networks."""

    def others(module: nn.Module) -> dict[str, Tensor]:
        named = module_tensors(module).items()
        return {name: value for name, value in named if not name.startswith(tuple(replaced))}

    assign(others(built), others(model), "upcycled model")


@torch.no_grad()
def convert_block(
    layer: ExpertLayer,
    tensors: Mapping[str, Tensor],
    config: UpcycleConfig,
    rng: Generator,
    inputs: Tensor | None = None,
) -> None:
    """Make ``layer`` (built from ``config.layer``) the network with ``tensors``, in place.

    ``tensors``: names of the experts' kind. ``inputs`` [..., D]: what the network is given.
    """
    stacks = copy(cut(layer.pool.kind, tensors, config.slices), config, rng)
    assign(layer.pool.stacks(), stacks, "experts")
    weight = layer.router(0).score.get_parameter("proj.weight")
    weight.copy_(router_rows(config, layer.width, rng, inputs))


def feed_forward_inputs(
    networks: Mapping[int, nn.Module],
    run: Callable[[], object],
    counted: Counted = lambda place, shape: None,
) -> dict[int, Tensor]:
    """f32 [T, D] per network: what it is given while ``run`` runs, without gradients; of many
    rows some, at random. ``counted``: which rows are no padding (None: all)."""
    seen: dict[int, list[Tensor]] = {place: [] for place in networks}
    with torch.no_grad(), _watched(networks, seen, counted):
        run()
    return {place: torch.cat(rows) for place, rows in seen.items() if rows}


@contextmanager
def _watched(
    networks: Mapping[int, nn.Module], seen: Mapping[int, list[Tensor]], counted: Counted
) -> Iterator[None]:
    """Inside the block, what the networks are given is kept."""

    def watch(place: int) -> Any:
        kept = seen[place]

        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if sum(map(len, kept)) < MAX_ROWS:
                rows = given[0].detach().flatten(0, -2)
                batch = given[0].shape[0] if given[0].dim() == 3 else 1
                mask = counted(place, (batch, len(rows) // batch))
                rows = rows if mask is None else rows[mask]
                some = torch.randperm(len(rows), generator=generator(0, "rows"))[: MAX_ROWS // 4]
                kept.append(rows[some.to(rows.device)].float().cpu())

        return look

    handles = [
        network.register_forward_pre_hook(watch(place)) for place, network in networks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
