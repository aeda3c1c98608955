"""A model with every kind of tensor a model directory must hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from coterie.core.context import Context
from coterie.experts import ExpertLayerConfig
from coterie.hub import save_pretrained

POOL = "layers.0.pool"
CONFIG = {"recipe": "toy", "model": {"width": 8}, "data": {"kind": "plane"}, "train": {}}


class SmallModel(nn.Module):
    """Two expert layers, tied embeddings, a constant table: every kind of tensor."""

    def __init__(self, num_experts: int = 3, width: int = 8) -> None:
        super().__init__()
        config = ExpertLayerConfig.from_dict(
            {"num_experts": num_experts, "router": {"selection_bias": True}}
        )
        self.embed = nn.Embedding(5, width)
        self.layers = nn.ModuleList(config.build(width) for _ in range(2))
        self.out = nn.Linear(width, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h, Context(batch=h.shape[0], tokens=h.shape[1])).y
        return self.out(h)


def scrambled(seed: int, **sizes: int) -> SmallModel:
    model = SmallModel(**sizes)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=rng))
    return model.eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def save_small(path: Path) -> Path:
    model = scrambled(1)
    return save_pretrained(model, path, CONFIG, description="A toy.", data_licence="CC0")
