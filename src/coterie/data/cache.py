"""Folders that appear complete or not at all, with a manifest of sizes and hashes.

Layout of the user's cache: ``$COTERIE_CACHE`` (default ``~/.cache/coterie``) holds one folder per
converted data set. A folder is written beside its place, flushed, then renamed: an interrupted
conversion leaves nothing that looks finished. A lock file keeps two processes from doing the same
work; it is released by the system when its owner dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from coterie.core.errors import DataError

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """``$COTERIE_CACHE`` if set, else ``~/.cache/coterie``."""
    chosen = os.environ.get("COTERIE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "coterie"


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
    for stale in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = target.parent / f".tmp-{target.name}-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        write(work)
        _write_manifest(work)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        _flush(path)
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": 1, "files": files}, indent=2, sort_keys=True))
    _flush(path)


def _flush(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def problem(folder: Path, deep: bool = False) -> str | None:
    """Why ``folder`` cannot be used, or None. ``deep`` compares hashes, not only sizes."""
    if not folder.is_dir():
        return "not there"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = folder / Path(name).name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                return f"{name} is missing or has the wrong size"
            if deep and file_digest(path) != facts["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def save_array(folder: Path, name: str, values: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)


def open_array(folder: Path, name: str) -> np.ndarray:
    """Memory-map ``name``.npy read-only; never unpickles."""
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / name}.npy cannot be read ({error}); fetch it again") from None
