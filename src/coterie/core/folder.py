"""Folders that are either complete and unchanged, or refused by name.

A sealed folder holds files and a ``manifest.json`` with the size and SHA-256 of each, and a digest
of the manifest itself. It is written beside its target and renamed, so a crash at any moment never
leaves half a folder under the target's name. Checkpoints and model directories are sealed folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from coterie.core.errors import CheckpointError, CoterieError, describe
from coterie.core.files import require_utf8

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
MAX_MANIFEST_BYTES = 64 * 2**20
_CHUNK = 2**20


def canonical(data: Any) -> str:
    """The one JSON text of ``data``: sorted keys, no NaN; equal data give equal text."""
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


def read_object(
    path: Path, missing: str = "", error: type[CoterieError] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a file; ``error`` where there is no such file (``missing``: what that
    means), or something else in it."""
    if not path.is_file():
        raise error(f"{path}: missing" + (f"; {missing}" if missing else ""))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(data, dict):
        raise error(f"{path}: not a JSON object")
    return data


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old text or the new one."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``target``, else it is removed.

    An existing target is replaced only with ``overwrite``. Failing disks (full, read-only) are a
    CheckpointError; what was there before stays.
    """
    require_utf8(target.absolute(), "folder", CheckpointError)
    if target.exists() and not overwrite:
        hint = "allow overwriting, or choose another path"
        raise CheckpointError(describe("folder", str(target), "a path that does not exist", hint))
    temporary = target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}"
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
    """Delete a folder so that a crash half-way leaves only a temporary name behind."""
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


def clean(parent: Path) -> None:
    """Remove what interrupted writes left behind; call only while nobody writes there."""
    if parent.is_dir():
        for path in parent.glob(f"{TEMPORARY}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def seal(folder: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every file in ``folder`` and write its manifest: ``header`` plus files and digest."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in _walk(folder)
        if path.is_file()
    }
    manifest = {**header, "files": files}
    manifest["digest"] = digest(manifest)
    (folder / MANIFEST).write_text(canonical(manifest), encoding="utf-8")
    return manifest


def libraries() -> dict[str, str]:
    """Versions that wrote a folder; kept for people, never compared."""
    out = {"python": platform.python_version()}
    for name in ("coterie", "torch"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a sealed folder of format ``kind``; its files are not looked at yet."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a complete {kind}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        unchanged = isinstance(manifest, dict) and canonical(manifest) == text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not valid JSON ({error})") from None
    if not unchanged:
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


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and isinstance(entry["sha256"], str)
    )


def check_name(name: str, where: Path) -> None:
    """Refuse a file name that could lead out of its folder."""
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
    if not path.resolve().is_relative_to(folder.resolve()) or path.is_symlink():
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


def verify_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check every file the manifest lists, and that no other file is there but what systems leave
    in folders that are looked at."""
    for name in manifest["files"]:
        verify_file(folder, name, manifest)
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        listed = name == MANIFEST or name in manifest["files"]
        if not listed and not path.is_dir() and not is_litter(path):
            raise CheckpointError(f"{path}: not listed in {MANIFEST}")


def is_litter(path: Path) -> bool:
    """What desktops and network file systems leave behind, in any folder and at any time."""
    known = path.name in (".DS_Store", "Thumbs.db", "desktop.ini")
    return known or path.name.startswith((".nfs", "._"))


def _walk(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))
