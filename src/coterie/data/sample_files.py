"""Listing the sample files of a folder; hidden and system files are skipped.

Hidden folders (``.git``, ``.ipynb_checkpoints``, ``.thumbnails``), underscored ones (``__MACOSX``)
and hidden files (``._1.png``) are never read; a warning names what was skipped, once.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from coterie.core.errors import DataError, describe
from coterie.core.files import escaped, reason, require_utf8
from coterie.core.paths import expanded


class DataWarning(UserWarning):
    """A file in a data folder was skipped; the message names it."""


def existing_folder(path: str | Path, field: str) -> Path:
    """The folder as a path; DataError if there is none."""
    root = expanded(path, field)
    require_utf8(root, field)
    try:
        found = root.is_dir()
    except ValueError:  # a zero byte in the name
        found = False
    if not found:
        raise DataError(describe(field, str(path), "an existing folder"))
    return root


def class_folders(root: Path) -> tuple[list[Path], list[str]]:
    """(folders that may hold a class, in order; names of those skipped)."""
    try:
        entries = sorted(entry for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({reason(error)})") from None
    kept = [entry for entry in entries if not entry.name.startswith((".", "_"))]
    return kept, [escaped(entry.name) for entry in entries if entry not in kept]


def files_below(folder: Path, suffixes: Collection[str], deep: bool = True) -> list[Path]:
    """Regular files with one of ``suffixes``, in order.

    DataError for a name that is not UTF-8 and a folder that cannot be read.
    """
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({reason(error)})")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if deep and not name.startswith((".", "_"))]
        for name in names:
            file = Path(place, name)
            if name.startswith(".") or file.suffix.lower() not in suffixes or not file.is_file():
                continue
            require_utf8(file, "file")
            found.append(file)
    return sorted(found)


def say_passed_over(kind: str, root: Path, names: Iterable[str]) -> None:
    """Warn of skipped folders, once each."""
    listed = ", ".join(names)
    if listed:
        text = f"{kind}: {root}: hidden, underscored or empty folders are no classes: {listed}"
        warnings.warn(text, DataWarning, stacklevel=2)


def listing_digest(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the names below ``root`` and the sizes of files, in the order given."""
    hasher = hashlib.sha256()
    for file in files:
        line = f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\n"
        hasher.update(line.encode())
    return hasher.hexdigest()
