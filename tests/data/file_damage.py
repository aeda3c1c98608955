"""What happens to files: bits flip, writes stop half-way, others put other files in their place."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Random = random.Random
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 2, 10**9, 10**30, 1e308, -1e308, float("nan"), float("inf"),
    "", "x", "\x00", "../../x", "²", "\ud800", "é" * 300, [], [[]], [None], {}, {"a": {}},
)  # fmt: skip


def _made(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _zip(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")


FOREIGN: tuple[bytes, ...] = (
    _made(lambda file: Image.new("RGB", (5, 4)).save(file, "PNG")),
    _made(lambda file: Image.new("RGB", (5, 4)).save(file, "EPS")),
    _made(lambda file: Image.new("L", (5, 4)).save(file, "ICO", sizes=[(4, 4)])),
    _made(lambda file: np.save(file, np.arange(12.0).reshape(4, 3))),
    _made(lambda file: np.save(file, np.array([1 + 2j]))),
    _made(lambda file: np.savez(file, a=np.zeros(3))),
    _made(_zip),
    *(text.encode() for text in ("{}", "[]", "null", "0", '"x"', "{", "NaN", "text\n", "a,b\n1,2")),
    b"[" * 100_000,
    b'{"a": ' * 50_000,
    b"9" * 5000,
    '{"kind": "digits"}'.encode("utf-16"),
    b"\xff\xfe\x00\x80" * 20,
    b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",  # a pickle
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",  # safetensors with a header of 2^63 bytes
    b'\x02\x00\x00\x00\x00\x00\x00\x00{}',  # safetensors without a tensor
    b"\x7fELF" + bytes(60),
    bytes(4096),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"<!DOCTYPE html><html>429</html>",
)  # fmt: skip


def flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_head(path: Path, rng: Random) -> None:
    """In the first bytes, where formats say what they are and how large."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 4))):
        if content:
            content[rng.randrange(min(len(content), 96))] = rng.choice((0, 1, 127, 128, 255, 32))
    path.write_bytes(content)


def truncate(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def zero(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content) + 1)
    size = rng.choice((1, 8, 512, len(content)))
    content[first : first + size] = bytes(len(content[first : first + size]))
    path.write_bytes(content)


def swap(path: Path, rng: Random) -> None:
    """Two blocks change places."""
    content, size = path.read_bytes(), rng.choice((1, 4, 64))
    one, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    if other - one >= size:
        left, right = content[one : one + size], content[other : other + size]
        content = (
            content[:one] + right + content[one + size : other] + left + content[other + size :]
        )
    path.write_bytes(content)


def repeat(path: Path, rng: Random) -> None:
    """A block is there twice."""
    content = path.read_bytes()
    first = rng.randrange(len(content) + 1)
    size = rng.choice((1, 8, 512))
    path.write_bytes(content[: first + size] + content[first:])


def empty(path: Path, rng: Random) -> None:
    path.write_bytes(b"")


def foreign(path: Path, rng: Random) -> None:
    path.write_bytes(rng.choice(FOREIGN))


def other_file(path: Path, rng: Random) -> None:
    """Another file of the same folder in its place."""
    others = [file for file in sorted(path.parent.iterdir()) if file.is_file()]
    shutil.copyfile(chosen, path) if (chosen := rng.choice(others)) != path else empty(path, rng)


def remove(path: Path, rng: Random) -> None:
    path.unlink()


def directory(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: Random) -> None:
    """To itself, to nothing, to its folder, or to its own content elsewhere."""
    aside = path.parent.parent / "aside"
    shutil.copyfile(path, aside)
    path.unlink()
    path.symlink_to(rng.choice((path.name, "nowhere", ".", str(aside))))


def pipe(path: Path, rng: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def value(path: Path, rng: Random) -> None:
    """One value of a JSON file is another; bits flip in files of other formats."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return flip(path, rng)
    places = [place for place in _places(data) if place[1] is not None]
    if not places:
        return foreign(path, rng)
    holder, key = rng.choice(places)
    deed = rng.choice(("set", "set", "set", "drop", "rename", "twice"))
    if deed == "set":
        holder[key] = rng.choice(ODD)
    elif deed == "drop" or not isinstance(holder, dict):
        del holder[key]
    elif deed == "rename":
        holder[f"{key}_"] = holder.pop(key)
    text = json.dumps(data)
    if deed == "twice" and text.startswith("{") and isinstance(data, dict) and data:
        name = rng.choice(sorted(data))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(rng.choice(ODD))}}}"
    path.write_text(text, encoding="utf-8")
    return None


def _places(data: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything in a JSON tree."""
    keys: list[Any] = []
    if isinstance(data, dict):
        keys = list(data)
    elif isinstance(data, list):
        keys = list(range(len(data)))
    found = [(data, key) for key in keys]
    for key in keys:
        found += _places(data[key])
    return found


Damage = Callable[[Path, Random], None]
DAMAGES: tuple[Damage, ...] = (
    flip, flip, flip_head, flip_head, truncate, truncate, zero, swap, repeat, empty, foreign,
    foreign, other_file, remove, directory, link, pipe, value, value, value,
)  # fmt: skip
OF_PLACE = (other_file, remove, directory, link, pipe)  # what is not in the bytes of a file
