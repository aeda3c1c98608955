"""Small convolutional networks for grey digits, garments and other little pictures.

Trained on the data at hand, the penultimate layer of a classifier gives features for metrics where
no ImageNet network makes sense. Legend: B batch, C channels, H height, W width, F =
``feature_dim``, K outputs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import ConfigError, describe
from coterie.encoders.features import ModuleFeatures


def make_norm(kind: Literal["group", "batch"], channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels), channels)


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
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        """``rng`` draws the initial weights (None: a fixed seed). With the norm "group" the answer
        for one picture does not depend on its batch mates, even in training."""
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
        self.norms = nn.ModuleList(make_norm(norm, count) for count in widths)
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


class MapNetwork(nn.Module):
    """One answer per pixel: three 3x3 convolutions down to a quarter of the side, two back up, each
    joined by what was there at that size, and a 1x1 convolution. Sides are multiples of 4."""

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        width: int = 32,
        rng: Generator | None = None,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        """``rng`` draws the initial weights (None: a fixed seed)."""
        super().__init__()
        for field, value in {
            "in_channels": in_channels,
            "outputs": outputs,
            "width": width,
        }.items():
            if value < 1:
                raise ConfigError(describe(field, value, "an integer >= 1"))
        w = width
        sizes = ((in_channels, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2))
        self.down = nn.ModuleList(
            nn.Conv2d(source, target, 3, stride=stride, padding=1, bias=False)
            for source, target, stride in sizes
        )
        self.up = nn.ModuleList(
            nn.Conv2d(source, target, 3, padding=1, bias=False)
            for source, target in ((6 * w, 2 * w), (3 * w, w))
        )
        self.norms_down = nn.ModuleList(make_norm(norm, count) for count in (w, 2 * w, 4 * w))
        self.norms_up = nn.ModuleList(make_norm(norm, count) for count in (2 * w, w))
        self.head = nn.Conv2d(w, outputs, 1)
        self.reset_parameters(rng or Generator().manual_seed(0))

    def reset_parameters(self, rng: Generator) -> None:
        for conv in (*self.down, *self.up, self.head):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=rng)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, K, H, W]."""
        if images.shape[-1] % 4 or images.shape[-2] % 4:
            allowed = "sides that are multiples of 4"
            raise ConfigError(describe("images.shape", tuple(images.shape), allowed))
        hidden, kept = images, []
        for conv, norm in zip(self.down, self.norms_down):
            hidden = F.relu(norm(conv(hidden)))
            kept.append(hidden)
        for conv, norm, there in zip(self.up, self.norms_up, kept[-2::-1]):
            larger = F.interpolate(hidden, size=there.shape[-2:], mode="nearest")
            hidden = F.relu(norm(conv(torch.cat([larger, there], dim=1))))
        return self.head(hidden)
