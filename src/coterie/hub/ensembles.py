"""An ensemble as a model directory: one file per member, read at once or when needed.

``` manifest.json               as of any model; its configuration is of kind ``ensemble``
members/00.safetensors      the first member that is there: all of it but its experts
experts/networks.0.<pool>/  experts of that member, one file each, where it has some
router.safetensors          the router between members, the aggregators of their features ```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.core.errors import CheckpointError, ConfigError, describe, unknown
from coterie.core.registry import Part
from coterie.core.tensors import (
    assign,
    copy_tensors,
    module_tensors,
    read_tensors,
    require_finite,
)
from coterie.ensembles import Ensemble, EnsembleModelConfig, MemberConfig, Members, model_of
from coterie.ensembles.blueprint import Blueprint
from coterie.ensembles.residency import LoadedMembers, Loader
from coterie.hub.layout import (
    ROUTER,
    Manifest,
    deciders,
    load_manifest,
    model_config,
    split,
)
from coterie.hub.save import save_pretrained


def save_ensemble(ensemble: Ensemble, path: str | Path, **options: Any) -> Path:
    """Write an ensemble whose members are in memory; ``options`` as in ``save_pretrained``.

    ConfigError if a member is no registered model, or is itself read from disk when needed.
    """
    if isinstance(ensemble.members, LoadedMembers):
        hint = "its members lie in a directory already: copy that"
        raise ConfigError(describe("ensemble", "read when needed", "members in memory", hint))
    return save_pretrained(ensemble, path, model_of(ensemble).model_dump(mode="json"), **options)


def load_ensemble(
    path: str | Path,
    *,
    resident: int | None = None,
    prefetch: bool = True,
    degraded: bool = False,
    device: torch.device | str = "cpu",
) -> Ensemble:
    """Read an ensemble.

    ``resident`` None: all members at once; n: at most n members in memory, each read when needed,
    and the next one in advance (``prefetch``). A member without files is left out, with a warning;
    damaged files are a CheckpointError, or with ``degraded`` treated as missing.
    """
    manifest = load_manifest(path)
    config = ensemble_config(manifest)
    found = _members(manifest, config, degraded, deep=degraded)
    config = config.replace(members=tuple(found))
    loaders = _loaders(manifest, config)
    if resident is None:
        built = {
            loader.facts.name: None if loader.facts.missing else loader.load() for loader in loaders
        }
        reasons = {loader.facts.name: loader.facts.reason for loader in loaders}
        traits = {member.name: member.traits for member in config.members}
        made = config.join(Members(built, reasons, traits))
    else:
        made = config.join(LoadedMembers(loaders, resident, prefetch, device))
    _read_deciders(manifest, made)
    return made.to(device)


def load_member(path: str | Path, name: str) -> nn.Module:
    """One member, in eval mode, without reading the files of others."""
    manifest = load_manifest(path)
    config = ensemble_config(manifest)
    known = [member.name for member in config.members if member.model is not None]
    if name not in known:
        raise ConfigError(unknown("member", name, known))
    alone = tuple(
        member if member.name == name else member.replace(model=None) for member in config.members
    )
    loaders = _loaders(manifest, config.replace(members=alone))
    made = next(loader for loader in loaders if loader.facts.name == name).load()
    assert isinstance(made, nn.Module)
    return made


def ensemble_config(manifest: Manifest) -> EnsembleModelConfig:
    """The configuration in the manifest; CheckpointError if it is not an ensemble."""
    from coterie.denoiser import MODELS

    config = model_config(manifest.config)
    found = None if config is None else MODELS.parse(config)
    if not isinstance(found, EnsembleModelConfig):
        kind = None if found is None else found.kind
        raise CheckpointError(describe(f"{manifest.path}: config.kind", kind, "ensemble"))
    there = [member for member in found.members if member.model is not None]
    if len(there) != len(manifest.members):
        allowed = f"{len(there)}, one per member"
        raise CheckpointError(describe(f"{manifest.path}: members", len(manifest.members), allowed))
    return found


def _members(
    manifest: Manifest, config: EnsembleModelConfig, degraded: bool, deep: bool
) -> list[MemberConfig]:
    """The members; those whose files are not there without their model. ``deep``: hashes too."""
    out, place = [], 0
    for member in config.members:
        if member.model is not None:
            for file in _files(manifest, place):
                reason = _problem(manifest, file, degraded, deep)
                if reason:
                    member = member.replace(model=None, reason=reason)
                    break
            place += 1
        out.append(member)
    return out


def _problem(manifest: Manifest, file: str, degraded: bool, deep: bool) -> str:
    """Why a file cannot be used; "" if it can. CheckpointError for damage, unless degraded."""
    if not (manifest.path / file).exists():
        return f"{manifest.path / file} is missing"
    try:
        manifest.file(file, hashes=deep)
    except CheckpointError as error:
        if not degraded:
            raise
        return str(error)
    return ""


def _files(manifest: Manifest, place: int) -> list[str]:
    """Every file of the member that was stored as number ``place``."""
    pools = _pools(manifest, place)
    return [manifest.members[place], *(file for files in pools.values() for file in files)]


def _pools(manifest: Manifest, place: int) -> dict[str, list[str]]:
    prefix = f"networks.{place}."
    return {
        path.removeprefix(prefix): files
        for path, files in manifest.pools.items()
        if path.startswith(prefix)
    }


def _loaders(manifest: Manifest, config: EnsembleModelConfig) -> list[Loader]:
    """One per member. Members of one configuration share their blueprint."""
    described = ensemble_config(manifest)
    blueprints: dict[str, tuple[Blueprint, tuple[str, ...]]] = {}
    loaders, place = [], 0
    for member, stored in zip(config.members, described.members, strict=True):
        load, size = _absent, 0
        if member.model is not None:
            key = member.model.to_json()
            if key not in blueprints:
                blueprints[key] = _blueprint(member.model)
            size = sum(int(manifest.files[file]["bytes"]) for file in _files(manifest, place))
            load = _MemberReader(manifest, place, *blueprints[key])
        loaders.append(Loader(member.facts(), load, size))
        place += stored.model is not None
    return loaders


def _blueprint(config: Part) -> tuple[Blueprint, tuple[str, ...]]:
    """Of one configuration, and where its stacks of experts are, which have files of their own."""
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = config.build()
    parts = split(model)
    later = module_tensors(model).keys() - parts.trunk.keys() - parts.router.keys()
    return Blueprint.of(model, later), tuple(parts.pools)


def _absent() -> Any:
    raise CheckpointError("the member is missing")


@dataclass
class _MemberReader:
    """Reads one member; hashes are checked the first time, sizes always."""

    manifest: Manifest
    place: int
    blueprint: Blueprint
    pools: tuple[str, ...]  # where its stacks of experts are
    checked: bool = False

    def __call__(self) -> Any:
        hashes = not self.checked
        path = self.manifest.file(self.manifest.members[self.place], hashes=hashes)
        tensors = copy_tensors(path)
        if hashes:
            require_finite(tensors, str(path))
        model = self.blueprint.make(tensors, str(path))
        pools: dict[str, Any] = {path: model.get_submodule(path) for path in self.pools}
        stored = _pools(self.manifest, self.place)
        counts = {pool: one.num_experts for pool, one in pools.items()}
        found = {pool: len(files) for pool, files in stored.items()}
        if counts != found:
            raise CheckpointError(describe(f"{path}: pools of experts", found, str(counts)))
        for pool, files in stored.items():
            for index, file in enumerate(files):
                tensors = read_tensors(self.manifest.file(file, hashes=hashes))
                if hashes:
                    require_finite(tensors, str(self.manifest.path / file))
                pools[pool].load_expert_state(index, tensors)
        self.checked = True
        return model


def _read_deciders(manifest: Manifest, made: Ensemble) -> None:
    """Weights and experts of the router and the aggregators, where it has any."""
    own: dict[str, torch.Tensor] = {}
    for owner, module in deciders(made).items():
        parts = split(module)
        flat = {**parts.trunk, **parts.router}
        own |= {f"{owner}.{name}": value for name, value in flat.items()}
        for pool, stack in parts.pools.items():
            for index, file in enumerate(manifest.pools.get(f"{owner}.{pool}", [])):
                stack.load_expert_state(index, read_tensors(manifest.file(file)))
    if own:
        path = manifest.file(ROUTER)
        assign(own, read_tensors(path), str(path))
