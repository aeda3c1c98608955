"""Fused experts per step, for routers that depend on the noise level alone.

Their choice at a step of a grid is the same for every input. So the chosen experts are fused in
advance into one expert of k times the inner size, or one linear map: the same function, without
router and dispatch (MoDE, arXiv:2412.12953; its cache is keyed by the mean of a noise embedding,
this one by layer and step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from coterie.cache.layer import FoldedLayer, check_foldable
from coterie.cache.schedule import Schedule
from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer

_CHUNK = 16  # steps asked for at once while folding


def fold(denoiser: Any, schedule: Schedule, x: Tensor, cond: Condition) -> dict[int, Any]:
    """id of an expert layer -> its replacement; ConfigError if a layer cannot be folded.

    ``x``, ``cond``: one sample and condition that the denoiser accepts.
    """
    layers = expert_layers(denoiser)
    recorded = _routings(denoiser, list(layers.values()), schedule.times, x, cond)
    return {id(layer): FoldedLayer(layer, recorded[layer], name) for name, layer in layers.items()}


def foldable(denoiser: nn.Module) -> bool:
    """Whether the denoiser has expert layers, all of which choose by the noise level alone."""
    try:
        return bool(expert_layers(denoiser))
    except ConfigError:
        return False


def expert_layers(denoiser: Any) -> dict[str, ExpertLayer]:
    """Path of each expert layer -> the layer, all of them foldable."""
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, ExpertLayer)}
    if not layers:
        raise ConfigError(describe("denoiser", "no expert layer", "a model with experts"))
    for name, layer in layers.items():
        check_foldable(layer, name)
    return layers


def example(
    denoiser: Any, cond: Condition | None, shape: Sequence[int] | None
) -> tuple[Tensor, Condition]:
    """One sample of noise and one condition that the denoiser accepts."""
    backbone = getattr(denoiser.config, "backbone", None)
    shape = getattr(backbone, "sample_shape", None) if shape is None else shape
    if shape is None:
        raise ConfigError(describe("shape", None, "the shape of one sample"))
    like = next(denoiser.parameters())
    x = torch.randn((1, *shape), generator=Generator().manual_seed(0)).to(like)
    if cond is None:
        label = torch.tensor([NULL_LABEL]) if getattr(backbone, "num_classes", 0) else None
        return x, Condition(label=label).to(like.device)
    return x, cond.index(torch.zeros(1, dtype=torch.long)).to(like.device)


@torch.no_grad()
def _routings(
    denoiser: Any, layers: Sequence[ExpertLayer], times: Tensor, x: Tensor, cond: Condition
) -> dict[ExpertLayer, list[Routing]]:
    """Every layer's routings, one per round with a row per step."""
    made: dict[ExpertLayer, list[tuple[Routing, ...]]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: made[layer].append(out.routings))
        for layer in layers
    ]
    try:
        for part in times.split(_CHUNK):
            t = part.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
            same = torch.zeros(len(part), dtype=torch.long, device=x.device)
            denoiser(x[same], t, cond.index(same))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: [_joined(parts) for parts in zip(*calls)] for layer, calls in made.items()}


def _joined(parts: Sequence[Routing]) -> Routing:
    """Routings of several calls as one; shorter lists of choices end with nobody."""
    first = parts[0]
    most = max(part.top_k for part in parts)
    pad = [(0, most - part.top_k) for part in parts]
    return first.replace(
        ids=torch.cat(
            [nn.functional.pad(r.ids, p, value=r.num_experts) for r, p in zip(parts, pad)]
        ),
        gates=torch.cat([nn.functional.pad(r.gates, p) for r, p in zip(parts, pad)]),
        probs=torch.cat([r.probs for r in parts]),
        logits=torch.cat([r.logits for r in parts]),
    )
