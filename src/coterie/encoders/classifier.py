"""A small convolutional classifier for grey digits, garments and other little pictures.

Trained on the data at hand, its penultimate layer gives features for metrics where no ImageNet
network makes sense. Legend: B batch, C channels, H height, W width, F = ``feature_dim``.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import ConfigError, describe
from coterie.encoders.features import ModuleFeatures


class SmallClassifier(nn.Module):
    """Three 3x3 convolutions (the later two halve the picture), mean pooling over 2x2 regions, F
    features, class logits. Takes any picture of at least 8x8. About 0.2M parameters."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int = 32,
        feature_dim: int = 64,
        rng: Generator | None = None,
    ) -> None:
        """``rng`` draws the initial weights (None: a fixed seed)."""
        super().__init__()
        counts = {"in_channels": in_channels, "num_classes": num_classes, "width": width}
        for field, value in {**counts, "feature_dim": feature_dim}.items():
            if value < 1:
                raise ConfigError(describe(field, value, "an integer >= 1"))
        self.feature_dim = feature_dim
        widths = (width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(source, target, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            for i, (source, target) in enumerate(zip((in_channels, *widths), widths))
        )
        # Group norm: the answer for one picture must not depend on its batch mates.
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, count), count) for count in widths)
        self.embed = nn.Linear(4 * widths[-1], feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)
        self.reset_parameters(rng or Generator().manual_seed(0))

    def reset_parameters(self, rng: Generator) -> None:
        for module in (*self.convs, self.embed, self.head):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, F], non-negative: the input of the last layer."""
        hidden = images
        for conv, norm in zip(self.convs, self.norms):
            hidden = F.relu(norm(conv(hidden)))
        pooled = F.adaptive_avg_pool2d(hidden, 2).flatten(1)
        return F.relu(self.embed(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> class logits [B, num_classes]."""
        return self.head(self.features(images))

    def as_features(self, name: str) -> ModuleFeatures:
        """The penultimate layer as a feature extractor; ``name`` should say what it learnt from."""
        device = self.head.weight.device

        def extract(images: Tensor) -> Tensor:
            return self.features(images.to(device=device, dtype=torch.float32))

        return ModuleFeatures(name, self.feature_dim, extract)
