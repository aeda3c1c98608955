"""Writing a model directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from coterie.core.cost import count_parameters
from coterie.core.errors import CheckpointError, describe
from coterie.core.folder import MANIFEST, atomic_folder, libraries, read_manifest, seal
from coterie.core.tensors import write_tensors
from coterie.hub.card import model_card
from coterie.hub.layout import (
    CARD,
    FORMAT,
    ROUTER,
    TRUNK,
    VERSION,
    Manifest,
    expert_name,
    load_manifest,
    split,
)


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    description: str = "",
    data_licence: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` and the JSON configuration to build it from, atomically.

    ``description`` and ``data_licence`` go to the model card, ``extra`` (JSON) to the manifest.
    ``overwrite`` replaces a model directory, but no other folder. Files that the manifest does not
    list, and an edited card, stay. CheckpointError if it cannot be written.
    """
    target = Path(path)
    kept: list[Path] = []
    if overwrite:
        _check_replaceable(target)
        kept = _of_others(target, lambda m: model_card(m, target.name, description, data_licence))
    parts = split(model)
    counts = count_parameters(model)
    pools = {
        name: [expert_name(name, index) for index in range(pool.num_experts)]
        for name, pool in parts.pools.items()
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "libraries": libraries(),
        "model_class": type(model).__name__,
        "config": _plain(config, "config"),
        "pools": pools,
        "parameters": {"total": counts.total, "active": counts.active},
        "extra": _plain(extra or {}, "extra"),
    }
    if parts.members:
        header["members"] = list(parts.members)
    with atomic_folder(target, overwrite=overwrite) as folder:
        for file, tensors in ((TRUNK, parts.trunk), (ROUTER, parts.router)):
            if tensors:
                write_tensors(folder / file, tensors)
        for file, tensors in parts.members.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_tensors(folder / file, tensors)
        for name, pool in parts.pools.items():
            (folder / pools[name][0]).parent.mkdir(parents=True)
            for index, file in enumerate(pools[name]):
                write_tensors(folder / file, pool.expert_state(index))
        seal(folder, header)
        # After sealing: people edit model cards.
        card = model_card(load_manifest(folder), target.name, description, data_licence)
        (folder / CARD).write_text(card, encoding="utf-8")
        for path in kept:
            goal = folder / path.relative_to(target)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, goal, follow_symlinks=False)
    return target


def _of_others(target: Path, card: Callable[[Manifest], str]) -> list[Path]:
    """Files in a model directory that are not as ``save_pretrained`` wrote them."""
    if not (target / MANIFEST).is_file():
        return []
    manifest = load_manifest(target)
    ours = {MANIFEST, *manifest.files}
    written = target / CARD
    if written.is_file() and written.read_bytes() == card(manifest).encode():
        ours.add(CARD)
    found = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in found if path.relative_to(target).as_posix() not in ours]


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        read_manifest(target, FORMAT, VERSION)
    except CheckpointError as error:
        hint = f"it is not a model directory ({error})"
        allowed = "a new path or a model directory"
        raise CheckpointError(describe("folder", str(target), allowed, hint)) from None


def _plain(data: Mapping[str, Any], field: str) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(data, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST}: {field} is not plain JSON ({error})") from None
