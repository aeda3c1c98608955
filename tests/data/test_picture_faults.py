"""Pictures of others: depth, rotation, transparency, formats, sizes; one reader for all verbs."""

from __future__ import annotations

import ast
import io
import os
import re
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import coterie
from coterie.core.errors import DataError
from coterie.data import build_source
from coterie.data.images.pictures import MAX_PIXELS, Pictures, read_picture, read_size
from coterie.data.sample_files import DataWarning
from coterie.runs.sample import guides, restoration

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


def content(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_A6_sixteen_bits_are_scaled_by_their_range(form: str) -> None:
    pixels = read_picture(content(Image.fromarray(RAMP), form), channels=1)[0]
    assert np.abs(pixels.astype(float) - RAMP / 257).max() <= 0.5
    assert len(np.unique(pixels)) == 64  # clipping would leave two
    assert read_picture(content(Image.fromarray(RAMP), form)).shape == (3, 8, 8)


def test_A6_floats_in_the_unit_range_are_scaled(tmp_path: Path) -> None:
    image = Image.fromarray((RAMP / 65535).astype(np.float32))
    image.save(tmp_path / "x.tif")
    pixels = read_picture(tmp_path / "x.tif", channels=1)[0]
    assert np.abs(pixels.astype(float) - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 4), 127.5, np.float32), r"numbers from 127\.5 to 127\.5.*in \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), "numbers from nan"),
        (np.full((4, 4), 70_000, np.int32), "whole numbers of 32 bits, from 70000 to 70000"),
        (np.full((4, 4), -3, np.int32), "whole numbers of 32 bits, from -3"),
    ],
)
def test_A6_numbers_without_a_known_range_are_refused(
    tmp_path: Path, values: np.ndarray, told: str
) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=rf"deep\.tif: .*{told}"):
        read_picture(tmp_path / "deep.tif")


def test_A6_transparent_value_of_sixteen_bits_is_white() -> None:
    image = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    with pytest.warns(DataWarning, match="its largest value is 1000"):
        assert (read_picture(content(image, transparency=1000)) == 255).all()
    with pytest.warns(DataWarning, match="its largest value is 1000"):
        assert (read_picture(content(image)) == round(1000 / 257)).all()


def odd_picture(path: Path) -> None:
    """Lying on its side, wide, transparent in the left half; white on black where it stands."""
    pixels = np.zeros((60, 20, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, :10, :3] = 200
    pixels[:, 10:, 3] = 0
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())


def test_A7_a_target_is_read_as_pictures_of_a_folder_are(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    for index in range(30):
        odd_picture(tmp_path / "set" / "a" / f"{index}.png")
    source = build_source({"kind": "image-folder", "path": str(tmp_path / "set"), "size": 8})
    target = guides.read_picture(tmp_path / "set" / "a" / "0.png", (3, 8, 8))
    np.testing.assert_array_equal(target.numpy(), source.get([0]).x[0].numpy())
    assert target.numpy()[:, :3].max() < 0.9 and (target.numpy()[:, -3:] == 1).all()
    assert guides.read_picture(tmp_path / "set" / "a" / "0.png", (1, 4, 8)).shape == (1, 4, 8)


def test_A7_every_picture_is_opened_by_one_reader() -> None:
    root = Path(coterie.__file__).parent
    opens = [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*.py"))
        if "Image.open" in path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert opens == ["data/images/pictures.py"]


def png_of(width: int, height: int) -> bytes:
    """A whole PNG of one grey value, a few kilobytes however large the picture."""

    def chunk(name: bytes, body: bytes) -> bytes:
        body = name + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (60_000, 60_000)])
def test_G10_a_huge_picture_is_refused_from_its_header(width: int, height: int) -> None:
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{MAX_PIXELS:,} pixels|as many or fewer"):
        read_picture(png_of(width, height), name="huge.png")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_G13_no_other_decoder_sees_a_file(tmp_path: Path) -> None:
    eps = content(Image.new("RGB", (4, 4)), "EPS")
    (tmp_path / "x.png").write_bytes(eps)
    assert Image.open(tmp_path / "x.png").format == "EPS"  # what would start Ghostscript
    with pytest.raises(DataError, match=r"x\.png: cannot be decoded"):
        read_picture(tmp_path / "x.png")
    stored = Pictures(1, lambda row: eps, lambda row: "row 0", 3, 8)
    with pytest.raises(DataError, match="row 0: cannot be decoded"):
        stored[np.array([0])]


def test_D9_whatever_a_decoder_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content(Image.new("RGB", (8, 8)), "TIFF")
    for error in (TypeError("a\nb"), KeyError(3), MemoryError(), AssertionError(), struct.error()):

        def fail(self: object, mode: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(DataError, match=r"odd\.tif: cannot be decoded \(.+\)") as caught:
            read_picture(whole, name="odd.tif")
        assert "\n" not in str(caught.value)


def test_H_pipes_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: a named pipe; allowed: a regular file"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(DataError, match="a folder; allowed"):
        read_picture(tmp_path)
    with pytest.raises(DataError, match=r"none\.png: cannot be read \(No such file"):
        read_picture(tmp_path / "none.png")


def test_size_is_read_upright_from_the_header(tmp_path: Path) -> None:
    odd_picture(tmp_path / "x.png")
    assert read_size(tmp_path / "x.png") == (20, 60) == read_picture(tmp_path / "x.png").shape[1:]
    assert restoration.read_picture is read_picture


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_A6_fewer_bits_than_sixteen_are_said_once_per_source(tmp_path: Path, bits: int) -> None:
    for number in range(24):
        place = tmp_path / "few" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content(Image.fromarray(RAMP >> (16 - bits))))
    source = build_source({"kind": "image-folder", "path": str(tmp_path), "size": 8})
    with pytest.warns(DataWarning) as found:
        source.get(np.arange(len(source)))
        source.get(np.arange(2))
    assert len(found) == 1
    told = rf"few/\d+\.png: its largest value is {2**bits - 1}, .* 0\.\.65535, .*multiply them by"
    assert re.search(rf"{told} {2 ** (16 - bits)} ", str(found[0].message))


def test_A6_what_uses_its_range_or_is_black_is_read_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(content(Image.fromarray(RAMP >> 1)))  # 15 bits
        read_picture(content(Image.fromarray(RAMP * 0)))
        read_picture(content(Image.fromarray((RAMP >> 12).astype(np.uint8))))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_A6_every_mode_of_a_file_becomes_grey_and_coloured(mode: str) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.new(mode, (4, 4), 100 if bands == 1 else (150, 120, 90, 0)[:bands])
    grey, coloured = (read_picture(content(image, "TIFF"), channels) for channels in (1, 3))
    assert grey.shape == (1, 4, 4) and coloured.shape == (3, 4, 4)
    known = np.array([0.299, 0.587, 0.114]) @ coloured[:, 0, 0]
    assert abs(float(grey[0, 0, 0]) - known) <= 8  # some modes hold a grey of their own
