"""General initialisation of networks; parts with their own rule reset themselves afterwards."""

from __future__ import annotations

from torch import nn


def xavier_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below ``module`` (the DiT rule)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def normal_linear(module: nn.Module, std: float) -> None:
    """N(0, std) weights and zero biases for every Linear and Embedding (language models)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def zero_linear(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
