"""Checkpoints: atomic, with checksums, without pickle.

``<run>/checkpoints/step-00000120/`` holds one safetensors file per group of tensors (model,
optimizer, ema-...) and a manifest with the hash of every file, the step, the configuration's hash
and all scalars. Killed at any moment, the newest complete checkpoint is found again; a damaged one
is skipped by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import coterie.core.tensors as tensors_io
from coterie.core.errors import CheckpointError
from coterie.core.folder import (
    MANIFEST,
    atomic_folder,
    libraries,
    read_manifest,
    refuse_link,
    remove,
    seal,
    verify_folder,
)

FORMAT = "coterie.checkpoint"
VERSION = 1
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})")

RETRIES = 20
"""Of reading the newest checkpoint while a trainer replaces it."""

Groups = Mapping[str, Mapping[str, Tensor]]
T = TypeVar("T")


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped; the message names the file."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    step: int
    config_hash: str
    state: dict[str, dict[str, Tensor]]  # group -> name -> tensor on the CPU
    scalars: dict[str, Any]  # JSON saved with it


def steps(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint on disk, oldest first."""
    parent = Path(run_dir) / FOLDER
    found = []
    if parent.is_dir():
        for path in parent.iterdir():
            match = NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
    return sorted(found)


def save(
    run_dir: str | Path,
    state: Groups,
    scalars: Mapping[str, Any],
    *,
    step: int,
    config_hash: str = "",
    keep: int = 3,
    is_bad: bool = False,
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the ``keep`` newest.

    ``is_bad``: it was saved amid skipped steps; it replaces only a bad one just before it.
    CheckpointError if the disk fails or a value is not finite; earlier checkpoints then stay.
    Checkpoints of later steps (damaged ones that resuming skipped) stay until training reaches
    them.
    """
    refuse_link(Path(run_dir) / FOLDER)
    for group, tensors in state.items():
        _check_finite(group, tensors)
    target = Path(run_dir) / FOLDER / f"step-{step:08d}"
    with atomic_folder(target, overwrite=True) as folder:
        for group, tensors in state.items():
            tensors_io.write_tensors(folder / f"{group}.safetensors", tensors)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "config_hash": config_hash,
            "libraries": libraries(),
            "scalars": dict(scalars),
            "is_bad": is_bad,
        }
        seal(folder, header)
    earlier = [path for number, path in steps(run_dir) if number < step]
    bad = [path for path in earlier if _is_bad(path)]
    good = [path for path in earlier if path not in bad]
    for path in [*bad, *(() if is_bad else good[: len(good) - max(keep, 1) + 1])]:
        _drop(path)
    return target


def drop_later(run_dir: str | Path, step: int) -> None:
    """Remove the checkpoints of steps after ``step``."""
    for number, path in steps(run_dir):
        if number > step:
            remove(path)


def _is_bad(path: Path) -> bool:
    try:
        return bool(read_manifest(path, FORMAT, VERSION).get("is_bad"))
    except CheckpointError:  # damaged: neither counted among the bad nor spared as one
        return False


def _check_finite(group: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{group}: {name} is not finite; no checkpoint is written, earlier ones are intact"
            )


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint; CheckpointError names the first bad file."""
    path = Path(path)
    manifest = read_manifest(path, FORMAT, VERSION)
    for field, kind in (("step", int), ("config_hash", str), ("scalars", dict)):
        if not isinstance(manifest.get(field), kind):
            raise CheckpointError(f"{path / MANIFEST}: {field} is missing or not a {kind.__name__}")
    verify_folder(path, manifest)
    return manifest


def latest(run_dir: str | Path, config_hash: str | None = None) -> Path | None:
    """The newest undamaged checkpoint; None if there are no checkpoints.

    Damaged ones are skipped with a CheckpointWarning. CheckpointError if all are damaged, or the
    newest belongs to another configuration.
    """
    return _settled(run_dir, config_hash, lambda path, _: path)


def load(path: str | Path) -> Checkpoint:
    """Verify every hash, then read all tensors to the CPU."""
    return _read(Path(path), verify(path))


def load_latest(run_dir: str | Path, config_hash: str | None = None) -> Checkpoint | None:
    """``load(latest(...))``, hashing the files once."""
    return _settled(run_dir, config_hash, _read)


def _settled(
    run_dir: str | Path, config_hash: str | None, use: Callable[[Path, dict[str, Any]], T]
) -> T | None:
    """``use`` of the newest checkpoint and its manifest; again where a trainer beside us has
    replaced it meanwhile."""
    for _ in range(RETRIES):
        with suppress(_Replaced):
            found = _newest(run_dir, config_hash)
            if found is None:
                return None
            with _unless_replaced(found[0]):
                return use(*found)
    raise CheckpointError(f"{run_dir}: checkpoints are replaced faster than they can be read")


class _Replaced(Exception):
    """The folder that was read is not there any more, or is another one of the same name."""


@contextmanager
def _unless_replaced(path: Path) -> Iterator[None]:
    before = _identity(path)
    try:
        yield
    except (CheckpointError, OSError):
        if before is None or _identity(path) != before:
            raise _Replaced from None
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _newest(run_dir: str | Path, config_hash: str | None) -> tuple[Path, dict[str, Any]] | None:
    problems = []
    for _, path in reversed(steps(run_dir)):
        try:
            with _unless_replaced(path):
                manifest = verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"checkpoint skipped: {error}", CheckpointWarning, stacklevel=4)
            continue
        if config_hash is not None and manifest["config_hash"] != config_hash:
            raise CheckpointError(
                f"{path}: made by configuration {manifest['config_hash']}, "
                f"this run is {config_hash}; put config.json back as it was, "
                "or use another run directory"
            )
        return path, manifest
    if problems:
        raise CheckpointError(f"{run_dir}: every checkpoint is damaged: {' | '.join(problems)}")
    return None


def _read(path: Path, manifest: dict[str, Any]) -> Checkpoint:
    state = {
        name.removesuffix(".safetensors"): tensors_io.read_tensors(path / name)
        for name in manifest["files"]
    }
    return Checkpoint(path, manifest["step"], manifest["config_hash"], state, manifest["scalars"])


def _drop(path: Path) -> None:
    # Failing to tidy up must not stop training: the new checkpoint is already safe.
    try:
        remove(path)
    except OSError as error:
        warnings.warn(f"{path}: could not be removed ({error})", CheckpointWarning, stacklevel=3)
