"""Recipe models cut down to scikit-learn's digits and a few bytes of text, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coterie.backbones import SlotConfig
from coterie.core.batch import Batch
from coterie.core.config import override
from coterie.core.context import NULL_LABEL
from coterie.core.prediction import Condition
from coterie.recipes import (
    deepseekmoe,
    dit_moe,
    dtr,
    get_recipe,
    list_recipes,
    promoe,
    switch_dit,
)
from coterie.recipes.common import image_tiny, text_tiny
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig

IMAGE = {
    "data": {"kind": "digits"},
    "model.backbone.image_size": 8,
    "model.backbone.patch": 2,
    "model.backbone.trunk.depth": 2,
}
TEXT = {"data": {"kind": "pydoc-topics", "context": 24}, "model.backbone.context": 24}


SMALL_RESTORER = {
    "kind": "restorer",
    "image_size": 16,
    "stem": 4,
    "tail": 8,
    "trunk": {
        "modulation": "none",
        "width": 16,
        "depth": 1,
        "heads": 2,
        "slots": [
            {
                "expert": {
                    "num_experts": 3,
                    "experts": "modulation",
                    "stem": "star",
                    "adaptor": 2.0,
                    "router_reads": "stream",
                    "router": {"when": "after", "score": "uncertain"},
                }
            }
        ],
    },
}


VARIANTS: dict[str, Callable[[], RunConfig]] = {
    "dense-ddpm": lambda: image_tiny("dit", flow=False),
    "dit-moe:no-balance": lambda: image_tiny("dit-moe", dit_moe.slot(64, ratio=1.0, balance=0.0)),
    "dtr:random": lambda: image_tiny("dtr", dtr.slot(mode="random"), flow=False),
    "switch-dit:no-prior": lambda: image_tiny("switch-dit", switch_dit.slot(prior=0.0), flow=False),
    "promoe:expert-choice": lambda: image_tiny("promoe", promoe.slot(64, 6, choice="expert")),
    "promoe:no-contrastive": lambda: image_tiny("promoe", promoe.slot(64, 6, contrastive=0.0)),
    "promoe:token-choice": lambda: image_tiny("promoe", promoe.plain_slot(64, 6)),
    "text:top-2-of-8": lambda: text_tiny("x", deepseekmoe.slot(8, 2, 128, segment=1, shared=0)),
    "text:dense": lambda: text_tiny("x"),
}


@cache
def small(name: str) -> RunConfig:
    """``recipe`` (its tiny preset), ``recipe/preset`` or a variant, on digits or text."""
    if name in VARIANTS:
        config = VARIANTS[name]()
    else:
        recipe, _, preset = name.partition("/")
        config = get_recipe(recipe).config(preset or "tiny")
    return override(config, TEXT if config.model.kind == "token_denoiser" else IMAGE)


RECIPES = tuple(list_recipes())
TRAIN_ALL = tuple(n for n in RECIPES if not getattr(get_recipe(n).config().init, "adapters", ()))
IMAGES = (
    *(name for name in TRAIN_ALL if get_recipe(name).config().model.backbone.kind == "dit"),
    *("promoe:expert-choice", "promoe:token-choice", "dtr:random"),
)
TEXTS = ("deepseekmoe/text", "text:top-2-of-8")


def with_slots(config: RunConfig, *slots: SlotConfig) -> RunConfig:
    """The same run with other expert slots in its trunk."""
    model = config.model
    trunk = model.backbone.trunk.replace(slots=slots)
    return config.replace(model=model.replace(backbone=model.backbone.replace(trunk=trunk)))


def woken(config: RunConfig, seed: int = 0, std: float = 0.05) -> Any:
    """The model with every parameter moved, as after some training: nothing is zero any more."""
    model = build_model(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def images(batch: int, seed: int = 0, labels: list[int] | None = None) -> Batch:
    """Noise in the shape of digits; every fourth sample has no label unless labels are given."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 8, 8, generator=rng).clamp(-1, 1)
    given = [NULL_LABEL if i % 4 == 3 else i % 10 for i in range(batch)]
    label = torch.tensor(given if labels is None else labels)
    return Batch(x, Condition(label=label), torch.arange(batch))


def words(batch: int, seed: int = 0, length: int = 24) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (batch, length), generator=rng)
    return Batch(ids, Condition(), torch.arange(batch))


def times(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05
