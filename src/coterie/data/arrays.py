"""Reading ``.npy`` and ``.npz`` files safely: headers are checked before data are read.

A header may promise more than the file holds, or an archive unpack to a thousand times its size:
both are refused from the header. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from coterie.core.errors import DataError, describe
from coterie.core.files import read_by_library, regular_file

Array = np.ndarray
MAGIC, ZIP = b"\x93NUMPY", b"PK"
MAX_UNPACKED, MAX_RATIO = 256 * 2**20, 100
"""An archive may unpack to so many bytes, or to so many times its own size, if that is more."""

_BAD = "not a readable array file"
_WANTED = "allowed: numbers written by numpy.save"
FLOATS = (2, 4, 8)
"""Bytes of the floating point numbers that torch has too; numpy has longer ones."""
NUMBERS = {"f": "floating point", "i": "integers", "u": "integers without sign", "b": "yes or no"}


def open_npy(
    path: Path, kinds: str = "fiu", dims: Sequence[int] = (), name: str = "", empty: bool = False
) -> Array:
    """Memory-map an ``.npy`` file read-only, in its own byte order.

    ``kinds``: allowed numpy type letters; ``dims``: allowed numbers of dimensions ((): any).
    DataError for other files, and for an empty array unless ``empty``.
    """
    name = name or str(path)
    size = regular_file(path)
    with read_by_library(f"{name}: {_BAD}"), path.open("rb") as file:
        shape, _, dtype, begin = _header(file, size, name)
    _check(name, shape, dtype, kinds, dims, empty)
    if begin + math.prod(shape) * dtype.itemsize != size:
        found = f"{size - begin:,} bytes of numbers"
        raise DataError(describe(name, found, f"{math.prod(shape) * dtype.itemsize:,} for {shape}"))
    with read_by_library(f"{name}: {_BAD}"):
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped


def native(values: Array) -> Array:
    """The array in this machine's byte order, which torch needs."""
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def read_npz(path: Path, name: str = "") -> dict[str, Array]:
    """All arrays of an ``.npz`` file, of any type but objects; check them with
    :func:`check_numbers`."""
    name = name or str(path)
    size = regular_file(path)
    found: dict[str, Array] = {}
    with read_by_library(f"{name}: {_BAD}"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        allowed = max(MAX_UNPACKED, MAX_RATIO * size)
        if unpacked > allowed:
            field = f"{name}: unpacked size"
            raise DataError(describe(field, f"{unpacked:,} bytes", f"{allowed:,} or fewer"))
        for entry in entries:
            key = entry.filename.removesuffix(".npy")
            if key in found:
                raise DataError(f"{name}: holds {key!r} twice")
            with archive.open(entry) as file:
                shape, fortran, dtype, begin = _header(file, entry.file_size, f"{name}: {key}")
                wanted = math.prod(shape) * dtype.itemsize
                if begin + wanted != entry.file_size:
                    given = f"{entry.file_size - begin:,} bytes of numbers"
                    field = f"{name}: {key}"
                    raise DataError(describe(field, given, f"{wanted:,} for {shape}"))
                flat = np.frombuffer(bytearray(file.read()), dtype)  # its end checks the sum
            found[key] = flat.reshape(shape, order="F" if fortran else "C")
    return found


def check_numbers(values: Array, name: str, kinds: str = "fiu", dims: Sequence[int] = ()) -> Array:
    """The array in this machine's byte order; DataError for other types or dimensions, or none."""
    _check(name, values.shape, values.dtype, kinds, dims, empty=False)
    return native(values)


def rows_digest(values: Array, labels: Array, rows: int = 64) -> str:
    """SHA-256 (hex) of shape, type, ``rows`` evenly spread rows and all labels, to identify a large
    array."""
    hasher = hashlib.sha256(f"{values.shape} {values.dtype}".encode())
    for row in np.unique(np.linspace(0, len(values) - 1, rows).round().astype(int)):
        hasher.update(np.ascontiguousarray(values[row]).tobytes())
    hasher.update(labels.astype("<i8").tobytes())
    return hasher.hexdigest()


def _header(file: IO[bytes], size: int, name: str) -> tuple[tuple[int, ...], bool, Any, int]:
    """(shape, in Fortran's order, dtype, where the numbers begin) of an ``.npy`` file."""
    if size == 0:
        raise DataError(f"{name}: not a plain array (0 bytes); {_WANTED}")
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        found = "an .npz archive" if magic.startswith(ZIP) else "of another format"
        raise DataError(f"{name}: not a plain array ({found}); {_WANTED}")
    version = tuple(file.read(2))
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise DataError(describe(f"{name}: version of the format", version, "(1, 0), (2, 0)"))
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise DataError(f"{name}: not a plain array (Python objects); {_WANTED}")
    if any(length < 0 for length in shape):
        raise DataError(describe(f"{name}: shape", shape, "lengths of 0 or more"))
    return shape, fortran, dtype, file.tell()


def _check(
    name: str, shape: tuple[int, ...], dtype: Any, kinds: str, dims: Sequence[int], empty: bool
) -> None:
    found = f"{dtype} of shape {shape}"
    if dtype.kind not in kinds:
        allowed = f"numbers: {', '.join(NUMBERS[kind] for kind in kinds)}"
        raise DataError(describe(name, found, allowed))
    if dtype.kind == "f" and dtype.itemsize not in FLOATS:
        raise DataError(describe(name, found, "floating point of 16, 32 or 64 bits"))
    if (dims and len(shape) not in dims) or not (empty or all(shape)):
        sizes = f"with {' or '.join(map(str, dims))} dimensions, " if dims else ""
        raise DataError(describe(name, found, f"numbers {sizes}at least one of them"))
