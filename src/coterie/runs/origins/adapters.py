"""Runs on a frozen base: adapters are trained, or taken from where they were trained.

The base (``init.path``) is read each time such a run is loaded; its checkpoints and its model
directory hold adapters alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coterie.adapters import (
    AdapterConfig,
    attach,
    base_digest,
    configs_of,
    load_adapter,
    weights_of,
)
from coterie.adapters.attach import Parts
from coterie.adapters.files import CONFIG
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.json_reader import read_object
from coterie.core.paths import beside, placed, relative
from coterie.core.tensors import assign, module_tensors, require_finite
from coterie.train import checkpoint
from coterie.train.run_directory import stored_hash

PARTS = ".adapters.parts."


def put_new(model: nn.Module, adapters: Sequence[AdapterConfig]) -> None:
    """The adapters that are to be trained."""
    for config in adapters:
        if config.lora is not None:
            attach(model, config.name, config.lora, config.weight)


def put_trained(model: nn.Module, config: AdapterConfig, base: str) -> None:
    """The adapter of a folder or a run, closed to training. ``base``: digest of the origin of the
    model's weights."""
    assert config.path is not None
    if (Path(config.path) / CONFIG).is_file():
        parts = load_adapter(model, config.name, config.path, config.weight)
    elif (Path(config.path) / "config.json").is_file():
        parts = _from_run(model, config, base)
    else:
        allowed = "a run directory, or a folder in PEFT's layout"
        where = f"init.adapters: {config.name}: path"
        raise ConfigError(describe(where, config.path, allowed))
    for part in parts.values():
        part.requires_grad_(False)


def _from_run(model: nn.Module, config: AdapterConfig, base: str) -> Parts:
    """The adapter that a run has trained (of several: that of the same name)."""
    path = Path(str(config.path))
    theirs = _init_of(path)
    with beside(path):
        listed = [AdapterConfig.from_dict(entry) for entry in theirs.get("adapters", ())]
    new = {adapter.name: adapter for adapter in listed if adapter.lora is not None}
    chosen = next(iter(new.values())) if len(new) == 1 else new.get(config.name)
    if chosen is None or chosen.lora is None:
        allowed = f"a run that trains an adapter (it trains: {', '.join(new) or 'none'})"
        raise ConfigError(describe(f"init.adapters: {config.name}: path", config.path, allowed))
    trained_on = (theirs.get("origin") or {}).get("digest", base)
    if trained_on != base:
        hint = f"its adapter was trained on {theirs.get('path')}"
        raise CheckpointError(describe(f"{path}: base", trained_on[:16], base[:16], hint))
    found = checkpoint.load_latest(path, stored_hash(path))
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint yet; train the run first")
    tensors = found.state.get("ema", found.state["model"])
    parts = attach(model, config.name, chosen.lora, config.weight, warn=False)
    for module, part in parts.items():
        prefix = f"{module}{PARTS}{chosen.name}."
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        own = module_tensors(part)
        cast = {k: v.to(own[k].dtype) if k in own else v for k, v in values.items()}
        require_finite(cast, f"{found.path}: {module}")
        assign(own, cast, f"{found.path}: {module}")
    return parts


def _init_of(path: Path) -> dict[str, Any]:
    """``init`` of a run's configuration; {} if it has none."""
    init = read_object(path / "config.json", error=ConfigError).get("init")
    if not isinstance(init, dict):
        return {}
    return {**init, "path": placed(str(init.get("path", "")), path)}


def described(model: nn.Module, base: str, folder: Path) -> dict[str, Any]:
    """What a model directory, ``folder``, says of its adapters and of the base they need, at
    ``base``."""
    # A model directory is handed on alone: what was said absolutely stays.
    path = base if os.path.isabs(base) else relative(base, folder)
    weights = weights_of(model)
    return {
        "base": {"path": path, "digest": base_digest(model)},
        "adapters": [
            {"name": name, "lora": config.model_dump(mode="json"), "weight": weights[name]}
            for name, config in configs_of(model).items()
        ],
    }
