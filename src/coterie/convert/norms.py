"""Batch normalisation of experts folded into the map in front of it, for serving.

``gamma (W x - mean) / sqrt(var + eps) + beta`` is one affine map of x outside training: fewer
tensors, no statistics, the same answer but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.tensors import assign, module_tensors
from coterie.experts import ExpertPool
from coterie.experts.kinds import NormMLP

KIND, NORM = "norm_mlp", "batch"


def folded_config(model: Part) -> Part:
    """The model's configuration with experts that have no norm. ConfigError where none has one."""
    data = model.model_dump(mode="json")
    if not _fold(data):
        hint = "nothing is to be folded"
        raise ConfigError(describe("experts", "no batch norm", f"{KIND} with norm={NORM}", hint))
    return type(model).from_dict(data)


def _fold(data: Any) -> int:
    """Change every expert kind inside ``data`` in place; how many there were."""
    if isinstance(data, list):
        return sum(_fold(value) for value in data)
    if not isinstance(data, dict):
        return 0
    if data.get("kind") == KIND and data.get("norm") == NORM:
        data["norm"] = "none"
        return 1
    return sum(_fold(value) for value in data.values())


@torch.no_grad()
def fold_norms(model: Any) -> tuple[Part, Any]:
    """``(configuration, model)`` in eval mode, with the output that ``model`` has in eval mode."""
    changed = folded_config(model.config)
    built = changed.build()
    pools = {name: pool for name, pool in model.named_modules() if isinstance(pool, ExpertPool)}
    values = dict(module_tensors(model))
    for name, pool in pools.items():
        if isinstance(pool.kind, NormMLP) and pool.kind.batch_statistics:
            for tensor in pool.tensors():
                values.pop(f"{name}.{tensor}", None)
            folded: Mapping[str, torch.Tensor] = pool.kind.fold(pool.tensors())
            values |= {f"{name}.{tensor}": value for tensor, value in folded.items()}
    own = module_tensors(built)
    assign(own, {name: values[name] for name in own if name in values}, "folded experts")
    like = next(iter(model.parameters()))
    answer: nn.Module = built.to(like.device, like.dtype).eval()
    return changed, answer
