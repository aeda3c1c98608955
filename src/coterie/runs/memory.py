"""Memory of a training step in bytes, computed from shapes.

What persists: weights, the optimiser's two moments, averages. What comes and goes: what the forward
pass leaves for the backward pass, and gradients, whose peaks lie at the two ends of the backward
pass. Of an expert layer every chosen row leaves its input and the two halves of SwiGLU, k (D + 2 F)
numbers per token, by the native operator on a CPU and by the kernels of a GPU. Networks that every
token passes are the operator's as well where it serves; on other devices, torch's. Legend: T
tokens, D width, F hidden, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayerConfig
from coterie.experts.dispatch.native import library
from coterie.runs.config import RunConfig
from coterie.train.precision import resolve_device

ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. ``trunk`` and ``experts``: what the forward pass leaves; ``updates``: temporaries of
    the optimiser's step."""

    weights: int
    optimizer: int
    averages: int
    gradients: int
    trunk: int
    experts: int
    updates: int

    @property
    def persistent(self) -> int:
        return self.weights + self.optimizer + self.averages

    @property
    def peak(self) -> int:
        """The larger end of the backward pass."""
        begin = self.trunk + self.experts
        return self.persistent + max(begin, self.gradients + self.updates)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "persistent": self.persistent, "peak": self.peak}


def training_memory(config: RunConfig, parameters: int) -> TrainingMemory:
    """Of one optimiser step of an image transformer in float32 on the configuration's device, which
    need not be here; ``parameters`` as ``count_parameters(model).total``. ConfigError for other
    models."""
    model = config.model
    if not isinstance(model, DenoiserConfig) or model.backbone.kind != "dit":
        kind = getattr(model, "backbone", model).kind
        raise ConfigError(describe("model.backbone.kind", kind, "dit"))
    batch = config.train.batch // config.train.accumulate
    weights, native = parameters * ITEM, served_natively(config.train.device)
    experts = sum(
        expert_rows(slot.expert, model.backbone.trunk.width, native) * layers
        for slot, layers in _slots(model)
    )
    return TrainingMemory(
        weights=weights,
        optimizer=2 * weights,
        averages=len(config.train.ema) * weights,
        gradients=weights,
        trunk=trunk_bytes(model, batch, native),
        experts=experts * batch * model.backbone.tokens * ITEM,
        updates=weights,
    )


def served_natively(device: str) -> bool:
    """Whether the native operator serves networks that every token passes on this device."""
    meant = resolve_device(device) if device == "auto" else torch.device(device)
    return meant.type == "cpu" and library().ready


def _slots(model: DenoiserConfig) -> list[tuple[Any, int]]:
    """Slots with a feed-forward network, and how many layers have them."""
    trunk = model.backbone.trunk
    ours = [slot for slot in trunk.slots if slot.slot == "ffn"]
    return [(slot, len(slot.sites(trunk.depth))) for slot in ours]


def expert_rows(config: ExpertLayerConfig, width: int, native: bool = True) -> int:
    """Numbers that an expert layer leaves per token: its input D, k (D + 2 F) of routed experts,
    2 F of shared ones where they are served natively, E logits and E probabilities. ConfigError for
    kinds without an F."""
    inner = getattr(config.kind, "size", None)
    if inner is None:
        allowed = "experts with an inner size, such as swiglu"
        raise ConfigError(describe("experts.kind", config.kind.kind, allowed))
    count = config.candidates(width)
    chosen = config.router.select_part.expected(count) * config.rounds
    total = width + chosen * (width + 2 * inner(width)) + 2 * count
    if config.shared is not None:
        shared = config.shared
        total += 2 * shared.hidden * shared.count if native else _shared_row(config, width)
    return round(total)


def _shared_row(config: ExpertLayerConfig, width: int) -> int:
    """Numbers that shared experts leave per token where torch serves them, but for their input."""
    assert config.shared is not None
    with torch.device("meta"):
        network, x = config.shared.build(config.kind, width), torch.empty(1, width)
    saved = _Saved((), network)
    with saved_tensors_hooks(saved.pack, saved.unpack):
        network(x)
    return saved.total // ITEM - width


def trunk_bytes(model: DenoiserConfig, batch: int, native: bool) -> int:
    """What everything but the networks in expert slots leaves for the backward pass."""
    trunk = model.backbone.trunk
    dense = model.replace(backbone=model.backbone.replace(trunk=trunk.replace(slots=())))
    with torch.device("meta"):
        made: Any = dense.build().train()
        x = torch.empty(batch, *dense.backbone.sample_shape)
        t = torch.empty(batch)
        label = torch.empty(batch, dtype=torch.long)
        replaced = {n for slot, _ in _slots(model) for n in slot.sites(trunk.depth)}
        blocks = made.backbone.trunk.blocks
        dense_rows = [_dense_row(block.ffn) for n, block in enumerate(blocks) if n not in replaced]
        own = [block.ffn for n, block in enumerate(blocks) if native or n in replaced]
        saved = _Saved(own, made)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            answer = made(x, t, Condition(label=label)).value
        del answer
    rows = batch * dense.backbone.tokens * ITEM
    return saved.total + (rows * sum(dense_rows) if native else 0)


def _dense_row(network: nn.Module) -> int:
    """Numbers that a feed-forward network leaves per token where the native operator serves it: its
    input, and the arguments of its activation."""
    first: Any = next(iter(network.children()))
    return int(first.in_features) + int(first.out_features)


class _Saved:
    """Bytes that autograd keeps, each storage once; not weights, nor what ``own`` modules keep."""

    def __init__(self, own: Sequence[nn.Module], model: nn.Module) -> None:
        self.total, self._inside = 0, False
        self._seen = {id(weight.untyped_storage()) for weight in model.parameters()}
        self._kept = [weight.untyped_storage() for weight in model.parameters()]
        for module in own:
            module.register_forward_pre_hook(lambda *_: self._enter(True))
            module.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    def pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if not self._inside and id(storage) not in self._seen:
            self._seen.add(id(storage))
            self._kept.append(storage)  # so that no other one gets its id
            self.total += storage.nbytes()
        return value

    def unpack(self, value: Tensor) -> Tensor:
        return value
