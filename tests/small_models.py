"""Recipe models cut down to scikit-learn's digits and a few bytes of text, and batches for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.config import override
from coterie.core.context import NULL_LABEL
from coterie.core.prediction import Condition
from coterie.recipes import get_recipe, list_recipes
from coterie.train.run import RunConfig, build_model

IMAGE = {
    "data": {"kind": "digits"},
    "model.backbone.image_size": 8,
    "model.backbone.patch": 2,
    "model.backbone.trunk.depth": 2,
}
TEXT = {"data": {"kind": "pydoc-topics", "context": 24}, "model.backbone.context": 24}


@cache
def small(name: str) -> RunConfig:
    """``recipe`` (its tiny preset), ``recipe:arm``, or ``recipe/preset``, on digits or text."""
    if ":" in name:
        recipe, arm = name.split(":")
        config = get_recipe(recipe).arms()[arm]
    else:
        recipe, _, preset = name.partition("/")
        config = get_recipe(recipe).config(preset or "tiny")
    return override(config, TEXT if config.model.kind == "token_denoiser" else IMAGE)


RECIPES = tuple(list_recipes())
IMAGES = (*RECIPES, "promoe:expert-choice", "promoe:token-choice", "dtr:random")
TEXTS = ("deepseekmoe/text", "deepseekmoe:text-gshard")


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
