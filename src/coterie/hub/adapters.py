"""Model directories that hold adapters only; the base is read from its own directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from coterie.adapters import LoraConfig, attach, base_digest
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import MANIFEST
from coterie.core.paths import placed
from coterie.hub.layout import Manifest


def is_adapted(manifest: Manifest) -> bool:
    """Whether the manifest describes adapters on a base."""
    return "adapters" in manifest.extra


def base_folder(manifest: Manifest, base: str | Path | None) -> Path:
    """The model directory of the base: ``base``, or the one that the manifest names.

    CheckpointError if there is none.
    """
    told = placed(str(_base(manifest).get("path", "")), manifest.path)
    wanted = Path(base if base is not None else told)
    for folder in (wanted / "model", wanted):
        if (folder / MANIFEST).is_file():
            return folder
    hint = "it holds adapters alone; say where their base lies: base=FOLDER"
    raise CheckpointError(
        describe(f"{manifest.path}: base", str(wanted), "a model directory", hint)
    )


def put_on_base(model: nn.Module, manifest: Manifest) -> None:
    """Attach the adapters of the manifest to the base ``model``, without their weights.

    CheckpointError if this is not the base that they were trained on.
    """
    wanted, found = _base(manifest).get("digest"), base_digest(model)
    if found != wanted:
        allowed = f"{wanted}, the weights that its adapters were trained on"
        raise CheckpointError(describe(f"{manifest.path}: base", found, allowed))
    try:
        for entry in manifest.extra["adapters"]:
            lora = LoraConfig.from_dict(entry["lora"])
            attach(model, str(entry["name"]), lora, float(entry["weight"]), warn=False)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{manifest.path / MANIFEST}: adapters: {error}") from None


def _base(manifest: Manifest) -> dict[str, Any]:
    base = manifest.extra.get("base")
    if not isinstance(base, dict):
        raise CheckpointError(f"{manifest.path / MANIFEST}: base is missing")
    return base
