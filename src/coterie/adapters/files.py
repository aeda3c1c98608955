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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.adapters.attach import Parts, adapters_of, attach, own_modules
from coterie.adapters.config import LoraConfig
from coterie.adapters.layers import Copy, LowRank, Rows, Shift, fits, own_state
from coterie.adapters.peft import (
    PEFT,
    STACKED,
    check_words,
    deciding,
    patterned,
    rows_of,
    saved_whole,
    words,
)
from coterie.adapters.stacks import Stacks, stacked
from coterie.core.errors import CheckpointError, ConfigError, describe, unknown
from coterie.core.folder import atomic_folder, canonical, digest
from coterie.core.json_reader import parse_json, read_object
from coterie.core.tensors import read_tensors, require_finite, tensors_digest, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN_E, UP_E = "experts_A", "experts_B"
DOWN, UP, TOKENS = "lora_A.weight", "lora_B.weight", "token_adapter.trainable_tokens_delta"
BIAS, OWN_BIAS = "bias", "base_layer.bias"


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The contents of an adapter folder: factors in PEFT's shapes, and trained rows, biases and
    modules."""

    path: Path
    config: LoraConfig
    basis_hash: str = ""
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def save_adapter(
    model: nn.Module, name: str, folder: str | Path, *, base: str = "", overwrite: bool = False
) -> Path:
    """Write one adapter of ``model``; ``base``: PEFT's entry for the base model's name or path."""
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
            if part.shift is not None:
                tensors[f"{PREFIX}{path}.{OWN_BIAS}"] = _bias(modules[path]) + part.shift
        elif isinstance(part, Shift):
            tensors[f"{PREFIX}{path}.{BIAS}"] = _bias(modules[path]) + part.change
        elif isinstance(part, Copy):
            for own, value in own_state(part.own).items():
                tensors[f"{PREFIX}{path}.{own}"] = value
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
        said = words(parts, base)
        write_tensors(work / WEIGHTS, tensors, _header(parts, tensors, said))
        (work / CONFIG).write_text(canonical(said), encoding="utf-8")
    return folder


def _require_plain(name: str, parts: Parts) -> None:
    """ConfigError where PEFT's layout has no word for what the adapter is."""
    config = next(iter(parts.values())).config
    ranks = {rank for part in parts.values() if isinstance(part, Stacks) for rank in part.ranks()}
    copies = [path for path, part in parts.items() if isinstance(part, Copy)]
    # A module is named by the end of its path there.
    also = [path for path in parts for end in copies if path not in copies and path.endswith(end)]
    for option, value, hint in (
        ("conv", "" if config.conv == "channels" else config.conv, "a convolution to r channels"),
        ("narrow", "" if len(ranks) < 2 else config.narrow, "stacked experts are of one rank"),
        ("copies", also, "their names end as those of other modules of the adapter"),
    ):
        if value:
            raise ConfigError(describe(f"{name}: {option}", value, "the default", hint))


def _bias(module: nn.Module) -> Tensor:
    assert isinstance(module.bias, Tensor)
    return module.bias.detach()


def _header(parts: Parts, tensors: dict[str, Tensor], said: Mapping[str, Any]) -> dict[str, str]:
    """With a hash of the weights and of what is said of them, which the format has none of."""
    config = next(iter(parts.values())).config
    told: dict[str, Any] = {}
    if config.basis is not None:
        told |= {"basis": config.basis.model_dump(mode="json"), "basis_hash": config.basis.hash}
    seal = told["sha256"] = _seal(_digest(tensors), said, told)
    # Twice: a file whose mark lost its name is not taken for one of others.
    return {"format": "pt", "coterie": json.dumps(told, sort_keys=True), "sha256": seal}


def _seal(weights: str, said: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """SHA-256 over all that decides what an adapter computes: its weights (by their hash), the
    words of its configuration, and its basis; "" for what is no JSON."""
    basis = {name: told.get(name) for name in ("basis", "basis_hash")}
    try:
        return digest({"weights": weights, "words": deciding(said), **basis})
    except ValueError:  # NaN, which is never written
        return ""


def _digest(tensors: dict[str, Tensor]) -> str:
    return tensors_digest({name: tensors[name] for name in sorted(tensors)})


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter folder. CheckpointError if it has another layout, uses options that are not
    supported, or holds weights that are not finite."""
    folder = Path(folder)
    data = read_object(folder / CONFIG, "no adapter configuration")
    where, weights = str(folder / CONFIG), str(folder / WEIGHTS)
    check_words(data, where)
    tensors = read_tensors(folder / WEIGHTS)
    require_finite(tensors, weights)
    (told, hashes), written = _told(folder / WEIGHTS), _digest(tensors)
    biases, copies = _set_apart(tensors, data)
    factors, tables, stacks = _sorted(tensors, weights, bool(biases or copies))
    if bool(stacks) != (data["peft_type"] == STACKED):
        allowed = STACKED if stacks else PEFT
        raise CheckpointError(describe(f"{where}: peft_type", data["peft_type"], allowed))
    rows = rows_of(data, tables, where)
    if len({tuple(own) for own in rows.values()}) > 1:
        name = f"{where}: trainable_token_indices"
        raise CheckpointError(describe(name, rows, "the same rows for every table"))
    if set(rows) != set(tables):
        allowed = f"those of {CONFIG}: {', '.join(rows) or 'none'}"
        raise CheckpointError(describe(f"{weights}: tables", sorted(tables), allowed))
    try:
        config = LoraConfig.from_dict(
            {
                "targets": sorted(factors),
                "experts": sorted(stacks),
                "rank": data.get("r", 8),
                "alpha": data.get("lora_alpha", 8),
                "ranks": patterned(data, "rank_pattern", factors, where),
                "alphas": patterned(data, "alpha_pattern", factors, where),
                "rank_scaling": bool(data.get("use_rslora")),
                "basis": told.get("basis"),
                "embeddings": sorted(rows),
                "rows": next(iter(rows.values()), ()),
                "biases": sorted(biases),
                "copies": sorted(copies),
            }
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    # Earlier versions hashed the weights alone; files of others have no hash.
    if not hashes or hashes <= {written} or hashes == {_seal(written, data, told)}:
        hash_ = str(told.get("basis_hash", ""))
        return AdapterFile(folder, config, hash_, factors, tables, stacks, biases, copies)
    hint = f"it or {CONFIG} is not as it was written"
    raise CheckpointError(f"{weights}: damaged, its SHA-256 does not match; {hint}")


def load_adapter(model: nn.Module, name: str, folder: str | Path, weight: float = 1.0) -> Parts:
    """Attach the adapter of a folder to ``model``.

    CheckpointError, with ``model`` unchanged, if its basis or shapes do not fit.
    """
    found = read_adapter(folder)
    basis = found.config.basis
    if basis is not None and basis.hash != found.basis_hash:
        hint = f"the basis that the file names has hash {basis.hash} here"
        raise CheckpointError(describe(f"{folder}: basis hash", found.basis_hash, basis.hash, hint))
    _check_shapes(model, found)
    parts = attach(model, name, found.config, weight, warn=False)
    modules = own_modules(model)
    for path, part in parts.items():
        if isinstance(part, LowRank):
            _fill(part, *found.factors[path], f"{folder}: {path}")
            if part.shift is not None:
                part.shift.data.copy_(found.biases[path] - _bias(modules[path]))
        elif isinstance(part, Shift):
            part.change.data.copy_(found.biases[path] - _bias(modules[path]))
        elif isinstance(part, Copy):
            for own, value in own_state(part.own).items():
                value.data.copy_(found.copies[path][own])
        elif isinstance(part, Stacks):
            for own in part.names:
                down, up = found.stacks[f"{path}.{own}"]
                part.down[own].data.copy_(down)
                part.up[own].data.copy_(up)
        elif isinstance(part, Rows):
            table = modules[path]
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
    modules, basis = own_modules(model), found.config.basis
    for path, (down, up) in found.factors.items():
        layer = modules.get(path)
        if layer is None or not fits(layer):
            there = [name for name, module in modules.items() if fits(module)]
            raise CheckpointError(unknown(f"{found.path}: module", path, there[:8]))
        weight, rank = layer.weight, found.config.rank_of(path)
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
        rank = found.config.rank
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
        tied = [p for p, m in modules.items() if m is not table and _weight(m) is table.weight]
        if tied:
            hint = "its rows would change there too, which an adapter here does not do"
            what = f"{found.path}: {path}"
            raise CheckpointError(describe(what, f"tied to {tied[0]}", "a table of its own", hint))
    for path, bias in found.biases.items():
        own_bias = getattr(modules.get(path), "bias", None)
        if not isinstance(own_bias, Tensor) or own_bias.shape != bias.shape:
            allowed = "the bias of a module of the model"
            raise CheckpointError(describe(f"{found.path}: {path}", tuple(bias.shape), allowed))
    for path, whole in found.copies.items():
        given = {name: tuple(value.shape) for name, value in whole.items()}
        module = modules.get(path, nn.Module())
        here = {name: tuple(value.shape) for name, value in own_state(module).items()}
        if given != here:
            raise CheckpointError(describe(f"{found.path}: {path}", given, str(here)))


def _weight(module: nn.Module) -> object:
    return module._parameters.get("weight")


Pairs = dict[str, tuple[Tensor, Tensor]]


def _set_apart(
    tensors: dict[str, Tensor], data: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Biases and whole modules by path, taken out of ``tensors``."""
    biases: dict[str, Tensor] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        path, _, own = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or "lora_" in key:
            continue
        if saved_whole(data, path):
            copies.setdefault(path, {})[own] = tensors.pop(key)
        elif own == BIAS and data.get("bias", "none") != "none":
            biases[path.removesuffix(".base_layer")] = tensors.pop(key)
    return biases, copies


def _sorted(
    tensors: dict[str, Tensor], where: str, others: bool
) -> tuple[Pairs, dict[str, Tensor], Pairs]:
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
        if lonely or not (others or any(found.values())):
            raise CheckpointError(
                describe(f"{where}: modules", lonely, f"{down} and {up} for each")
            )
    factors, stacks = (
        {path: (value, found[up][path]) for path, value in found[down].items()}
        for down, up in ((DOWN, UP), (DOWN_E, UP_E))
    )
    return factors, tables, stacks


def _told(path: Path) -> tuple[dict[str, Any], set[str]]:
    """What this library wrote into the header, and its hashes; {} for files of others."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    told = parse_json(header.get("coterie", "{}"), f"{path}: damaged header", CheckpointError)
    told = told if isinstance(told, dict) else {}
    marks = (told.get("sha256"), header.get("sha256"))
    return told, {str(mark) for mark in marks if mark is not None}
