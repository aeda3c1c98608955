"""Reading a model directory: all of it, lazily, or one expert."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.tensors import assign, module_tensors, read_tensors, require_finite
from coterie.hub.adapters import base_folder, is_adapted, put_on_base
from coterie.hub.layout import ROUTER, TRUNK, Manifest, Split, load_manifest, model_config, split


@dataclass(frozen=True)
class MissingExpert:
    """An expert that could not be read, and the reason."""

    pool: str
    index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.pool}[{self.index}]"


def load_expert(path: str | Path, pool: str, index: int) -> dict[str, Tensor]:
    """One expert's tensors (without the leading E); reads and checks its file only."""
    return _expert(load_manifest(path), pool, index)


def load_tensors(path: str | Path, *, lazy: bool = True) -> Mapping[str, Tensor]:
    """Every tensor of a model directory by name; experts' are ``<pool>[<index>].<name>``.

    Lazy: a file is checked and memory-mapped when one of its tensors is first used.
    """
    tensors = ModelTensors(load_manifest(path))
    return tensors if lazy else dict(tensors.items())


def load_into(
    model: nn.Module,
    path: str | Path,
    *,
    degraded: bool = False,
    check_finite: bool = True,
) -> list[MissingExpert]:
    """Load all weights into a model of the same class and shape; returns experts that are missing.

    CheckpointError, with the model unchanged, for any damaged, missing or foreign file, and for NaN
    or infinity unless ``check_finite`` is False. ``degraded``: experts that cannot be read become
    zero (their output is 0) and are returned, so that the caller can mask them.
    """
    manifest = load_manifest(path)
    if manifest.model_class != type(model).__name__:
        allowed = f"{manifest.model_class}, the class the directory was saved from"
        raise CheckpointError(describe("model", type(model).__name__, allowed))
    parts = split(model)
    _check_pools(manifest, parts)
    if any(value.is_meta for value in module_tensors(model).values()):
        hint = "call model.to_empty(device='cpu') first"
        raise CheckpointError(describe("model", "meta", "a model with memory", hint))
    flat = {file: _read(manifest, file, own) for file, own in _flat(parts).items()}
    if check_finite:
        for file, tensors in flat.items():
            require_finite(tensors, str(manifest.path / file))
    experts, missing = _experts(manifest, parts, degraded, check_finite)
    for file, own in _flat(parts).items():
        assign(own, flat[file], str(manifest.path / file))
    for (pool, index), tensors in experts.items():
        parts.pools[pool].load_expert_state(index, tensors)
    for lost in missing:
        zeros = {
            name: torch.zeros_like(value)
            for name, value in parts.pools[lost.pool].expert_state(lost.index).items()
        }
        parts.pools[lost.pool].load_expert_state(lost.index, zeros)
        warnings.warn(
            f"expert {lost} is missing and contributes nothing: {lost.reason}", stacklevel=2
        )
    return missing


def load_pretrained(
    path: str | Path,
    *,
    degraded: bool = False,
    check_finite: bool = True,
    base: str | Path | None = None,
) -> nn.Module:
    """Build the model of a directory and load its weights, in eval mode; see :func:`load_into`.

    ``base``: folder of the base of adapters, if it was moved. ConfigError if the configuration is
    not one of a registered model.
    """
    from coterie.denoiser import MODELS

    manifest = load_manifest(path)
    config = model_config(manifest.config)
    if config is None:
        hint = "build the model yourself and call load_into"
        raise ConfigError(describe("config", "no kind", ", ".join(MODELS.kinds()), hint))
    model: nn.Module
    if manifest.members:
        from coterie.hub.ensembles import load_ensemble

        return load_ensemble(path, degraded=degraded)
    if is_adapted(manifest):
        model = load_pretrained(base_folder(manifest, base), degraded=degraded)
        put_on_base(model, manifest)
    else:
        model = MODELS.parse(config).build()
    load_into(model, path, degraded=degraded, check_finite=check_finite)
    return model.eval()


class ModelTensors(Mapping[str, Tensor]):
    """Lazy view of a model directory's tensors; files are opened and checked on first use."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open: dict[str, dict[str, Tensor]] = {}
        self._prefixes = {
            file: f"{pool}[{index}]."
            for pool, files in manifest.pools.items()
            for index, file in enumerate(files)
        }
        for index, file in enumerate(manifest.members):
            self._prefixes[file] = f"networks.{index}."

    def __getitem__(self, key: str) -> Tensor:
        for file in self._files(key):
            name = key.removeprefix(self._prefixes.get(file, ""))
            if name in (tensors := self._tensors(file)):
                return tensors[name]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        for file in self._all_files():
            prefix = self._prefixes.get(file, "")
            yield from (f"{prefix}{name}" for name in self._tensors(file))

    def __len__(self) -> int:
        return sum(len(self._tensors(file)) for file in self._all_files())

    def _all_files(self) -> list[str]:
        flat = [file for file in (TRUNK, ROUTER) if file in self.manifest.files]
        return [*flat, *self._prefixes]

    def _files(self, key: str) -> list[str]:
        matching = {f: prefix for f, prefix in self._prefixes.items() if key.startswith(prefix)}
        experts = sorted(matching, key=lambda file: -len(matching[file]))  # experts before members
        return experts or [file for file in self._all_files() if file not in self._prefixes]

    def _tensors(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            self._open[file] = read_tensors(self.manifest.file(file))
        return self._open[file]


def _flat(parts: Split) -> dict[str, dict[str, Tensor]]:
    flat = {file: own for file, own in ((TRUNK, parts.trunk), (ROUTER, parts.router)) if own}
    return flat | parts.members


def _read(manifest: Manifest, file: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the trunk or router file, checked against the model, in the model's precision."""
    values = {
        name: value.to(own[name].dtype) if name in own and value.is_floating_point() else value
        for name, value in read_tensors(manifest.file(file)).items()
    }
    # Into stand-ins first: nothing in the model changes before everything has been checked.
    stand_ins = {name: torch.empty_like(value, device="meta") for name, value in own.items()}
    assign(stand_ins, values, str(manifest.path / file))
    return values


def _expert(manifest: Manifest, pool: str, index: int) -> dict[str, Tensor]:
    return read_tensors(manifest.file(manifest.expert_file(pool, index)))


def _check_pools(manifest: Manifest, parts: Split) -> None:
    own = {name: pool.num_experts for name, pool in parts.pools.items()}
    stored = {name: len(files) for name, files in manifest.pools.items()}
    if own != stored:
        raise CheckpointError(
            describe(f"{manifest.path}: pools of experts", stored, f"those of the model: {own}")
        )


def _experts(
    manifest: Manifest, parts: Split, degraded: bool, check_finite: bool
) -> tuple[dict[tuple[str, int], dict[str, Tensor]], list[MissingExpert]]:
    """Every expert's tensors, checked; and, where allowed, the experts that cannot be had."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    missing = []
    for pool, module in parts.pools.items():
        for index, file in enumerate(manifest.pools[pool]):
            try:
                tensors = _expert(manifest, pool, index)
                own = module.expert_state(index)
                cast = {n: v.to(own[n].dtype) if n in own else v for n, v in tensors.items()}
                assign(own, cast, str(manifest.path / file))
                if check_finite:
                    require_finite(tensors, str(manifest.path / file))
            except CheckpointError as error:
                if not degraded:
                    raise
                missing.append(MissingExpert(pool, index, str(error)))
            else:
                found[pool, index] = tensors
    return found, missing
