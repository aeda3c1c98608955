"""Data sets in the user's cache (:mod:`coterie.core.user_cache`).

Each converted data set is one sealed folder (:mod:`coterie.core.folder`): it appears complete or
not at all. A lock file keeps two processes from doing the same work; the system releases it when
its owner dies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from coterie.core.errors import CheckpointError, DataError
from coterie.core.folder import atomic_folder, clean, read_manifest, seal, verify_file
from coterie.data.arrays import open_npy

FORMAT, VERSION = "coterie-data", 1


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; waits for whoever holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise DataError(
            f"cache {path.parent}: cannot be written ({error.strerror}); "
            "set COTERIE_CACHE to a folder of your own"
        ) from None
    with handle:
        try:
            import fcntl
        except ImportError:  # no such lock on Windows; the atomic rename still keeps data whole
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill ``target`` by ``write(temporary folder)``; replaces an older ``target``.

    The caller holds the lock of ``target``, so leftovers of a killed process may be removed.
    """
    clean(target.parent, re.compile(re.escape(target.name)))
    try:
        with atomic_folder(target, overwrite=True) as work:
            write(work)
            seal(work, {"format": FORMAT, "version": VERSION})
    except CheckpointError as error:
        raise DataError(str(error)) from None


_hashed: set[tuple[str, int, int, int]] = set()
"""Files whose hash was right, by path, inode, size and time of change: read once per process."""


def problem(folder: Path, deep: bool = False) -> str | None:
    """Why ``folder`` cannot be used, or None. ``deep`` compares hashes, not only sizes; a file that
    has not changed since it was hashed is not read again."""
    try:
        manifest = read_manifest(folder, FORMAT, VERSION)
        for name in manifest["files"]:
            found = verify_file(folder, name, manifest, hashes=False)
            if deep and (state := _state(found)) not in _hashed:
                verify_file(folder, name, manifest)
                _hashed.add(state)
    except CheckpointError as error:
        return str(error)
    return None


def _state(path: Path) -> tuple[str, int, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns


def save_array(folder: Path, name: str, values: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)


def open_array(folder: Path, name: str) -> np.ndarray:
    """Memory-map ``name``.npy read-only; never unpickles."""
    try:
        return open_npy(folder / f"{name}.npy", kinds="fiub", empty=True)
    except DataError as error:
        raise DataError(f"{folder / name}.npy cannot be read ({error}); fetch it again") from None
