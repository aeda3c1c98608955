"""From any picture to u8 [C, H, W] of a fixed size; pictures that are decoded when read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from coterie.core.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


def to_pixels(image: Image.Image, channels: int, side: int | None) -> np.ndarray:
    """u8 [C, side, side]: upright, over white where transparent, shorter edge scaled to ``side``
    and the centre cut out (``side`` None: as it is)."""
    image = ImageOps.exif_transpose(image)
    layer = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    flat = flat.convert("L" if channels == 1 else "RGB")
    if side is not None:
        flat = ImageOps.fit(flat, (side, side), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(flat, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def read_picture(file: Path) -> np.ndarray:
    """u8 [3, H, W]; DataError where it cannot be decoded."""
    try:
        with Image.open(file) as image:
            return to_pixels(image, 3, None)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be decoded ({error}); repair or remove it") from None


class Pictures:
    """Pictures decoded when read, indexed like an array: ``pictures[rows]`` is u8 [B, C, H, W].

    ``read(i)`` opens picture i, ``name(i)`` says which one it was in an error.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[int], Any],
        name: Callable[[int], str],
        channels: int,
        side: int,
    ) -> None:
        self._size, self._read, self._name = size, read, name
        self._shape = (channels, side, side)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(rows), *self._shape), dtype=np.uint8)
        for position, row in enumerate(rows):
            pixels[position] = self._decode(int(row))
        return pixels

    def _decode(self, row: int) -> np.ndarray:
        try:
            image = self._read(row)
            if not isinstance(image, Image.Image):
                raise DataError(f"{self._name(row)}: holds {type(image).__name__}, not a picture")
            with image:
                return to_pixels(image, self._shape[0], self._shape[1])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._name(row)}: cannot be decoded ({error}); repair or remove it"
            ) from None
