"""From any picture to u8 [C, H, W]; the one place where pictures are opened.

Formats are listed, so no other decoder of the library (some start programs) ever sees a file;
sizes are read from the header before a pixel is decoded. Depths: 8 bits as they are; 16 bits by
their range, 0..65535; numbers with a fraction in [0, 1]. Anything else is refused by name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from coterie.core.errors import DataError, describe
from coterie.core.files import reason, regular_file
from coterie.data.sample_files import DataWarning

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
MAX_PIXELS = 80_000_000
"""Of one picture: decoding holds about 12 bytes for each."""

Given = Path | bytes | Image.Image
_CLEAR = ("RGBA", "LA", "PA", "RGBa", "La")  # modes with an alpha channel
_BY_RGB = ("LAB", "HSV")  # modes that become grey by way of RGB alone
_ORIENTATION = 0x0112


@contextmanager
def opened(given: Given, name: str = "") -> Iterator[Image.Image]:
    """A picture whose header is read and allowed; DataError of one line for whatever a decoder
    raises, here or inside the block. ``name``: which picture, in an error."""
    name = name or (str(given) if isinstance(given, Path) else "picture")
    if isinstance(given, Path):
        regular_file(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the decoders, about files of others
            with _open(given) as image:
                if image.width * image.height > MAX_PIXELS:
                    found = f"{image.width}x{image.height} pixels"
                    raise DataError(describe(name, found, f"{MAX_PIXELS:,} pixels or fewer"))
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{name}: more than {MAX_PIXELS:,} pixels; allowed: as many or fewer"
        ) from None
    except Exception as error:  # decoders raise nearly every kind
        raise DataError(
            f"{name}: cannot be decoded ({reason(error)}); repair or remove it"
        ) from None


def _open(given: Given) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    return Image.open(io.BytesIO(given) if isinstance(given, bytes) else given, formats=FORMATS)


class Dark:
    """Says once for all pictures of a source that one uses little of the range of its numbers."""

    def __init__(self) -> None:
        self._said = False

    def say(self, name: str, largest: int, top: int) -> None:
        if self._said:
            return
        self._said = True
        text = (
            f"{name}: its largest value is {largest}, less than a quarter of 0..{top}, from which "
            "its numbers are scaled to 0..255: it becomes dark, and others like it; if they use "
            f"fewer bits, multiply them by {(top + 1) >> largest.bit_length()} and save them again"
        )
        warnings.warn(text, DataWarning, stacklevel=3)


def to_pixels(
    image: Image.Image, channels: int, side: int | tuple[int, int] | None, name: str = "picture"
) -> np.ndarray:
    """u8 [C, H, W]: upright, over white where transparent, scaled to cover ``side`` (or height and
    width) and the centre cut out (None: as it is)."""
    image = _eight_bits(image, name)
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in _CLEAR or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if image.mode in _BY_RGB:
        image = image.convert("RGB")
    flat = image.convert("L" if channels == 1 else "RGB")
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else side
        flat = ImageOps.fit(flat, (width, height), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(flat, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A picture of deeper numbers scaled to 8 bits by the range of their type."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    known, top = _range(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            found = f"numbers from {values.min():.4g} to {values.max():.4g}"
            allowed = "numbers with a fraction in [0, 1], or whole ones of 8 or 16 bits"
            raise DataError(describe(name, found, allowed))
        scaled = values * 255.0
    elif known and values.min() >= 0 and values.max() <= top:
        scaled = values * (255.0 / top)
    else:
        found = f"whole numbers of 32 bits, from {values.min()} to {values.max()}"
        raise DataError(describe(name, found, "8 or 16 bits, or numbers in [0, 1]"))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled = np.where(values == clear, 255.0, scaled)
    made = Image.fromarray(np.round(scaled).astype(np.uint8))
    if image.getexif().get(_ORIENTATION, 1) != 1:
        made.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
    return made


def _range(image: Image.Image) -> tuple[bool, int]:
    """(whether it is known, the largest value that can be) of whole numbers above 8 bits: the
    library widens 16 bits to 32 for some formats, and only of these is it known."""
    known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    return known and image.mode != "F", 4095 if _bits(image) == 12 else 65535


def _little_used(image: Image.Image) -> tuple[int, int] | None:
    """(largest value, largest that can be) where all values lie in the lowest quarter; a picture
    that is black all over is what it is."""
    known, top = _range(image) if image.mode.startswith("I") else (False, 0)
    largest = int(np.asarray(image).max()) if known else 0
    return (largest, top) if 0 < largest < (top + 1) // 4 else None


def _bits(image: Image.Image) -> int:
    """Bits of a value as a TIFF file says; 16 of any other."""
    said = getattr(image, "tag_v2", {}).get(258, (16,))
    return int(said[0] if isinstance(said, tuple) else said)


def read_picture(
    given: Given,
    channels: int = 3,
    side: int | tuple[int, int] | None = None,
    name: str = "",
    dark: Dark | None = None,
) -> np.ndarray:
    """u8 [C, H, W] as of :func:`to_pixels`; DataError where it cannot be decoded, DataWarning where
    deep numbers use little of their range: once for all pictures that share ``dark``."""
    called = name or str(getattr(given, "name", "picture"))
    with opened(given, name) as image:
        little = _little_used(image)
        pixels = to_pixels(image, channels, side, called)
    if little is not None:
        (dark or Dark()).say(called, *little)
    return pixels


def read_size(file: Path) -> tuple[int, int]:
    """(height, width) of the picture upright, from its header alone."""
    with opened(file) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


class Pictures:
    """Pictures decoded when read, indexed like an array: ``pictures[rows]`` is u8 [B, C, H, W].

    ``give(i)`` says where picture i is: its file, its bytes, or as decoded by another library;
    ``name(i)`` which one it was, in an error.
    """

    def __init__(
        self,
        size: int,
        give: Callable[[int], Any],
        name: Callable[[int], str],
        channels: int,
        side: int,
    ) -> None:
        self._size, self._give, self._name = size, give, name
        self._shape, self._dark = (channels, side, side), Dark()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(rows), *self._shape), dtype=np.uint8)
        for position, row in enumerate(rows):
            pixels[position] = self._decode(int(row))
        return pixels

    def _decode(self, row: int) -> np.ndarray:
        given = self._give(row)
        if not isinstance(given, Path | bytes | Image.Image):
            raise DataError(f"{self._name(row)}: holds {type(given).__name__}, not a picture")
        return read_picture(given, self._shape[0], self._shape[1], self._name(row), self._dark)
