"""Sealed folders: complete and unchanged, or refused with an error that names the file.

A sealed folder holds files and a ``manifest.json`` with the size and SHA-256 of each, and a digest
of the manifest itself. It is written beside its target and renamed, so a crash at any moment never
leaves half a folder under the target's name. Checkpoints and model directories are sealed folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from coterie.core.errors import CheckpointError, CoterieError, describe
from coterie.core.files import require_utf8
from coterie.core.json_reader import read_object

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
_TEMPORARY = re.compile(r"\.tmp-(?:old-)?(.+)-\d+")
_CHUNK = 2**20


class FolderWarning(UserWarning):
    """A file in a folder was ignored; the message names it."""


def canonical(data: Any) -> str:
    """``data`` as JSON text with sorted keys and no NaN; equal data give equal text."""
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def digest(data: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``data``."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_of(path: Path) -> Path:
    """The temporary path at which this process writes before it renames to ``path``."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


def open_own(path: Path, flags: int) -> int:
    """A file descriptor of ``path``; OSError if it is a link, which could lead anywhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC, 0o666)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old text or the new one.

    A link of that name is replaced, not followed.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, for bytes."""
    temporary = temporary_of(path)
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``target``, else it is removed.

    An existing target is replaced only with ``overwrite``. CheckpointError if the disk fails (full,
    read-only); an existing target then stays.
    """
    require_utf8(target.absolute(), "folder", CheckpointError)
    refuse_link(target)
    if target.exists() and not overwrite:
        hint = "allow overwriting, or choose another path"
        raise CheckpointError(describe("folder", str(target), "a path that does not exist", hint))
    temporary = temporary_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        yield temporary
        for path in [*_walk(temporary), temporary]:
            sync(path)
        doomed = _set_aside(target)
        temporary.rename(target)
        sync(target.parent)
        if doomed is not None:
            shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({error.strerror or error}); "
            "nothing saved before is changed; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder; a crash half-way leaves only a temporary name behind."""
    doomed = _set_aside(folder)
    if doomed is not None:
        shutil.rmtree(doomed)


def _set_aside(folder: Path) -> Path | None:
    """Rename a folder to a temporary name; None if there is none."""
    if not folder.exists():
        return None
    doomed = folder.parent / f"{TEMPORARY}old-{folder.name}-{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)
    return folder.rename(doomed)


def clean(parent: Path, names: re.Pattern[str]) -> None:
    """Remove temporary files that interrupted writes of ``names`` left in ``parent``.

    Call it only while no other process writes there.
    """
    if not parent.is_dir():
        return
    for path in parent.glob(f"{TEMPORARY}*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not names.fullmatch(found[1]) or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_link(path: Path, error: type[CoterieError] = CheckpointError) -> None:
    """``error`` if the path is a link: writing through it would change a file elsewhere."""
    if path.is_symlink():
        raise error(f"{path}: a link to {os.readlink(path)}; nothing is written through links")


def seal(folder: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every file in ``folder`` and write its manifest: ``header`` plus files and digest."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in _walk(folder)
        if path.is_file() and not is_litter(path)
    }
    manifest = {**header, "files": files}
    manifest["digest"] = digest(manifest)
    (folder / MANIFEST).write_text(canonical(manifest), encoding="utf-8")
    return manifest


def libraries() -> dict[str, str]:
    """Library versions, stored in a folder for information; never compared."""
    from importlib import metadata  # slow to import, and only writers need it

    out = {"python": platform.python_version()}
    for name in ("coterie", "torch"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a sealed folder of format ``kind``; files are not yet checked."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a complete {kind}")
    manifest = read_object(path)
    if not _is_as_written(path, manifest):
        raise CheckpointError(f"{path}: damaged, not as it was written")
    for field, allowed in (("format", kind), ("version", version)):
        if manifest.get(field) != allowed:
            raise CheckpointError(describe(f"{path}: {field}", manifest.get(field), repr(allowed)))
    claimed = manifest.pop("digest", None)
    if claimed != digest(manifest):
        raise CheckpointError(f"{path}: damaged, its own digest does not match")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(f"{path}: files must map each name to its bytes and sha256")
    for name in files:
        check_name(name, folder)
    return manifest


def _is_as_written(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        return canonical(manifest).encode() == path.read_bytes()
    except ValueError:  # NaN, which is never written
        return False


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and isinstance(entry["sha256"], str)
    )


def check_name(name: str, where: Path) -> None:
    """CheckpointError for a file name that could lead out of its folder."""
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in parts:
        raise CheckpointError(f"{where / MANIFEST}: file name {name!r} is not allowed")


def verify_file(
    folder: Path, name: str, manifest: Mapping[str, Any], *, hashes: bool = True
) -> Path:
    """Check one listed file: inside the folder, regular, right size, right hash."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise CheckpointError(f"{folder / name}: not listed in {MANIFEST}")
    path = folder / name
    if not _is_inside(path, folder):
        raise CheckpointError(f"{path}: a link; only regular files inside the folder are allowed")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(
            f"{path}: damaged, {path.stat().st_size} bytes instead of {entry.get('bytes')}"
        )
    if hashes and file_digest(path) != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged, its SHA-256 does not match")
    return path


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return not path.is_symlink() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead to each other
        return False


def verify_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check every file of the manifest. Other files are an error, but for those that operating
    systems create (:func:`is_litter`)."""
    for name in manifest["files"]:
        verify_file(folder, name, manifest)
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == MANIFEST or name in manifest["files"]:
            continue
        if is_litter(path):
            warnings.warn(f"{path}: ignored, the system put it there", FolderWarning, stacklevel=3)
        else:
            raise CheckpointError(f"{path}: not listed in {MANIFEST}")


def is_litter(path: Path) -> bool:
    """Whether a name is one that desktops and network file systems create in any folder."""
    known = path.name in (".DS_Store", "Thumbs.db", "desktop.ini")
    return known or path.name.startswith((".nfs", "._"))


def _walk(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))
