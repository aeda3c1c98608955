"""Adapters as files in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

Both libraries read what either has written. What PEFT has no word for (the basis) stands in the
header of the safetensors file. An adapter with factors of stacked experts names a ``peft_type`` of
its own, so that PEFT refuses what it would read in part: ``PATH.experts_A`` [E, r, I] and
``PATH.experts_B`` [E, O, r] of each parameter at PATH. Written are whole folders; read is nothing
but safetensors and JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.adapters.attach import Parts, adapters_of, attach, own_modules
from coterie.adapters.config import LoraConfig
from coterie.adapters.layers import LowRank, Rows, fits
from coterie.adapters.stacks import Stacks, stacked
from coterie.core.errors import CheckpointError, ConfigError, describe, unknown
from coterie.core.folder import atomic_folder, canonical
from coterie.core.json_reader import parse_json, read_object
from coterie.core.tensors import read_tensors, require_finite, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT, STACKED = "LORA", "LORA_EXPERTS"
DOWN_E, UP_E = "experts_A", "experts_B"
DOWN, UP, TOKENS = "lora_A.weight", "lora_B.weight", "token_adapter.trainable_tokens_delta"
REFUSED = (
    *("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"),
    *("lora_bias", "layer_replication", "use_bdlora", "use_qalora", "target_parameters"),
    *("arrow_config", "alora_invocation_tokens"),
)
"""Options of PEFT that change the function or the layout in ways these adapters do not have."""


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A folder as it was read: factors by path in PEFT's shapes, and the new values of rows."""

    path: Path
    config: LoraConfig
    basis_hash: str = ""
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def save_adapter(
    model: nn.Module, name: str, folder: str | Path, *, base: str = "", overwrite: bool = False
) -> Path:
    """Write one adapter of ``model``; ``base`` is what PEFT calls the base model's name or path."""
    there = adapters_of(model)
    if name not in there:
        raise ConfigError(unknown("adapter", name, there))
    folder, parts = Path(folder), there[name]
    _require_plain(name, parts)
    modules, tensors = own_modules(model), {}
    for path, part in parts.items():
        if isinstance(part, LowRank):
            down, up = part.factors()
            tensors[f"{PREFIX}{path}.{DOWN}"], tensors[f"{PREFIX}{path}.{UP}"] = down, up
        elif isinstance(part, Stacks):
            for own in part.names:
                tensors[f"{PREFIX}{path}.{own}.{DOWN_E}"] = part.down[own]
                tensors[f"{PREFIX}{path}.{own}.{UP_E}"] = part.up[own]
        elif isinstance(part, Rows):
            table = modules[path]
            assert isinstance(table, nn.Embedding)
            tensors[f"{PREFIX}{path}.{TOKENS}"] = table.weight[list(part.rows)] + part.change
    require_finite(tensors, f"adapter {name}")
    with atomic_folder(folder, overwrite=overwrite) as work:
        write_tensors(work / WEIGHTS, tensors, _header(parts))
        (work / CONFIG).write_text(canonical(_peft(parts, base)), encoding="utf-8")
    return folder


def _require_plain(name: str, parts: Parts) -> None:
    """ConfigError where PEFT's layout has no word for what the adapter is."""
    config = next(iter(parts.values())).config
    ranks = {part.rank for part in parts.values() if isinstance(part, LowRank)}
    for part in parts.values():
        ranks |= part.ranks() if isinstance(part, Stacks) else set()
    extras: dict[str, object] = {"biases": config.biases, "copies": config.copies}
    extras["conv"] = "" if config.conv == "channels" else config.conv
    extras["narrow"] = "" if len(ranks) < 2 else config.narrow
    for option, value in extras.items():
        if value:
            hint = "a file of this layout holds low-rank maps of one rank, and rows of tables"
            raise ConfigError(describe(f"{name}: {option}", value, "the default", hint))


def _header(parts: Parts) -> dict[str, str]:
    config = next(iter(parts.values())).config
    if config.basis is None:
        return {"format": "pt"}
    told = {"basis": config.basis.model_dump(mode="json"), "basis_hash": config.basis.hash}
    return {"format": "pt", "coterie": json.dumps(told, sort_keys=True)}


def _peft(parts: Parts, base: str) -> dict[str, Any]:
    config = next(iter(parts.values())).config
    rows = {path: list(part.rows) for path, part in parts.items() if isinstance(part, Rows)}
    stacks = {p: part.names for p, part in parts.items() if isinstance(part, Stacks)}
    experts = sorted(f"{path}.{name}" for path, names in stacks.items() for name in names)
    return {
        "peft_type": STACKED if experts else PEFT,
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "use_rslora": config.rank_scaling,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(p for p in parts if p not in rows and p not in stacks),
        **({"target_experts": experts} if experts else {}),
        "trainable_token_indices": rows or None,
    }


def read_adapter(folder: str | Path) -> AdapterFile:
    """CheckpointError for a folder that is not of this layout, asks for what is not here, or holds
    weights that are not finite."""
    folder = Path(folder)
    data = read_object(folder / CONFIG, "no adapter configuration")
    if data.get("peft_type") not in (PEFT, STACKED) or data.get("bias", "none") != "none":
        found = (data.get("peft_type"), data.get("bias"))
        raise CheckpointError(describe(f"{folder / CONFIG}: peft_type, bias", found, "LORA, none"))
    for name in REFUSED:
        if data.get(name):
            hint = "adapters here are plain sums of low-rank maps"
            raise CheckpointError(describe(f"{folder / CONFIG}: {name}", data[name], "none", hint))
    tensors = read_tensors(folder / WEIGHTS)
    require_finite(tensors, str(folder / WEIGHTS))
    told = _told(folder / WEIGHTS)
    factors, tables, stacks = _sorted(tensors, str(folder / WEIGHTS))
    if bool(stacks) != (data["peft_type"] == STACKED):
        where = f"{folder / CONFIG}: peft_type"
        raise CheckpointError(describe(where, data["peft_type"], STACKED if stacks else PEFT))
    rows = data.get("trainable_token_indices") or {}
    if len({tuple(own) for own in rows.values()}) > 1:
        where = f"{folder / CONFIG}: trainable_token_indices"
        raise CheckpointError(describe(where, rows, "the same rows for every table"))
    if set(rows) != set(tables):
        allowed = f"those of {CONFIG}: {', '.join(rows) or 'none'}"
        raise CheckpointError(describe(f"{folder / WEIGHTS}: tables", sorted(tables), allowed))
    try:
        config = LoraConfig.from_dict(
            {
                "targets": sorted(factors),
                "experts": sorted(stacks),
                "rank": data.get("r", 8),
                "alpha": data.get("lora_alpha", 8),
                "rank_scaling": bool(data.get("use_rslora")),
                "basis": told.get("basis"),
                "embeddings": sorted(rows),
                "rows": next(iter(rows.values()), ()),
            }
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    return AdapterFile(folder, config, str(told.get("basis_hash", "")), factors, tables, stacks)


def load_adapter(model: nn.Module, name: str, folder: str | Path, weight: float = 1.0) -> Parts:
    """Put the adapter of a folder on ``model``; :class:`CheckpointError`, with ``model`` as it was,
    where its basis or its shapes are not what they should be."""
    found = read_adapter(folder)
    basis = found.config.basis
    if basis is not None and basis.hash != found.basis_hash:
        hint = f"the basis that the file names has hash {basis.hash} here"
        raise CheckpointError(describe(f"{folder}: basis hash", found.basis_hash, basis.hash, hint))
    _check_shapes(model, found)
    parts = attach(model, name, found.config, weight, warn=False)
    for path, part in parts.items():
        if isinstance(part, LowRank):
            _fill(part, *found.factors[path], f"{folder}: {path}")
        elif isinstance(part, Stacks):
            for own in part.names:
                down, up = found.stacks[f"{path}.{own}"]
                part.down[own].data.copy_(down)
                part.up[own].data.copy_(up)
        elif isinstance(part, Rows):
            table = own_modules(model)[path]
            assert isinstance(table, nn.Embedding)
            old = table.weight.detach()[list(part.rows)]
            part.change.data.copy_(found.tables[path].to(old) - old)
    return parts


def _fill(part: LowRank, down: Tensor, up: Tensor, where: str) -> None:
    for own, value in ((part.down, down.flatten(1)), (part.up, up.flatten(1))):
        if isinstance(own, nn.Parameter):
            own.data.copy_(value)
        else:  # the direction that the basis fixes, checked in _check_shapes
            assert own.shape == value.shape, where


def _check_shapes(model: nn.Module, found: AdapterFile) -> None:
    modules, rank, basis = own_modules(model), found.config.rank, found.config.basis
    for path, (down, up) in found.factors.items():
        layer = modules.get(path)
        if layer is None or not fits(layer):
            there = [name for name, module in modules.items() if fits(module)]
            raise CheckpointError(unknown(f"{found.path}: module", path, there[:8]))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        ones = (1,) * (weight.dim() - 2)
        wanted = (rank, *weight.shape[1:]), (weight.shape[0], rank, *ones)
        if (tuple(down.shape), tuple(up.shape)) != wanted:
            shapes = tuple(down.shape), tuple(up.shape)
            raise CheckpointError(describe(f"{found.path}: {path}", shapes, str(wanted)))
        if basis is not None:
            fixed = down.flatten(1) if basis.side == "input" else up.flatten(1).T
            try:
                own = basis.directions(fixed.shape[1], rank)
            except ConfigError as error:
                raise CheckpointError(f"{found.path}: {path}: {error}") from None
            if not torch.allclose(fixed.float(), own, atol=1e-3):
                hint = f"it is not slot {basis.index} of the basis that it names"
                raise CheckpointError(f"{found.path}: {path}: the fixed factor differs; {hint}")
    for path, (down, up) in found.stacks.items():
        owner, _, stack = path.rpartition(".")
        if owner not in modules or stack not in stacked(modules[owner]):
            there = [f"{p}.{n}" for p, m in modules.items() for n in stacked(m)]
            raise CheckpointError(unknown(f"{found.path}: experts", path, there[:8]))
        count, outputs, *rest = modules[owner].get_parameter(stack).shape
        wanted = (count, rank, math.prod(rest)), (count, outputs, rank)
        if (tuple(down.shape), tuple(up.shape)) != wanted:
            shapes = tuple(down.shape), tuple(up.shape)
            raise CheckpointError(describe(f"{found.path}: {path}", shapes, str(wanted)))
    for path, values in found.tables.items():
        table = modules.get(path)
        wanted_rows = (len(found.config.rows), getattr(table, "embedding_dim", None))
        if not isinstance(table, nn.Embedding) or tuple(values.shape) != wanted_rows:
            allowed = f"rows {found.config.rows} of an embedding of the model"
            raise CheckpointError(describe(f"{found.path}: {path}", tuple(values.shape), allowed))


Pairs = dict[str, tuple[Tensor, Tensor]]


def _sorted(tensors: dict[str, Tensor], where: str) -> tuple[Pairs, dict[str, Tensor], Pairs]:
    """Factors by path, rows by path, and factors of stacked experts by the parameter's path."""
    found: dict[str, dict[str, Tensor]] = {end: {} for end in (DOWN, UP, TOKENS, DOWN_E, UP_E)}
    for key, value in tensors.items():
        for ending, kept in found.items():
            if key.startswith(PREFIX) and key.endswith(f".{ending}"):
                kept[key.removeprefix(PREFIX).removesuffix(f".{ending}")] = value
                break
        else:
            raise CheckpointError(describe(f"{where}: tensor", key, f"{PREFIX}PATH.{DOWN} or {UP}"))
    tables = found[TOKENS]
    for down, up in ((DOWN, UP), (DOWN_E, UP_E)):
        lonely = sorted(found[down].keys() ^ found[up].keys())
        if lonely or not any(found.values()):
            raise CheckpointError(
                describe(f"{where}: modules", lonely, f"{down} and {up} for each")
            )
    factors, stacks = (
        {path: (value, found[up][path]) for path, value in found[down].items()}
        for down, up in ((DOWN, UP), (DOWN_E, UP_E))
    )
    return factors, tables, stacks


def _told(path: Path) -> dict[str, Any]:
    """What this library wrote into the header, {} for files of others."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    told = parse_json(header.get("coterie", "{}"), f"{path}: damaged header", CheckpointError)
    return told if isinstance(told, dict) else {}
