"""The files of a model directory, and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor, nn

from coterie.core.config import Config
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import MANIFEST, read_manifest, verify_file
from coterie.core.numbers import Total
from coterie.core.tensors import is_borrowed, module_tensors
from coterie.ensembles import Ensemble
from coterie.experts import Router

FORMAT = "coterie.model"
VERSION = 1
TRUNK = "trunk.safetensors"
ROUTER = "router.safetensors"
EXPERTS = "experts"
MEMBERS = "members"
CARD = "README.md"


class _ManifestFile(Config):
    """Fields of ``manifest.json``; unknown ones are refused."""

    format: str
    version: int
    libraries: dict[str, str]
    model_class: str
    config: dict[str, Any]
    pools: dict[str, list[str]]
    parameters: dict[str, Total]
    extra: dict[str, Any]
    files: dict[str, dict[str, Any]]
    members: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    path: Path
    model_class: str  # name of the model's class
    config: dict[str, Any]  # configuration of the model, or of its run
    pools: dict[str, list[str]]  # module path of each expert pool -> files of its experts, in order
    parameters: dict[str, Total]  # numbers of parameters
    libraries: dict[str, str]  # versions that wrote it
    extra: dict[str, Any]  # JSON given to ``save_pretrained``
    files: dict[str, dict[str, Any]]  # file -> its size and SHA-256
    members: list[str] = field(default_factory=list)  # files of an ensemble's members

    def file(self, name: str, *, hashes: bool = True) -> Path:
        """Path of a listed file, after a check of its size and hash."""
        return verify_file(self.path, name, {"files": self.files}, hashes=hashes)

    def expert_file(self, pool: str, index: int) -> str:
        """Name of an expert's file; ConfigError, with the existing ones, if there is none."""
        if pool not in self.pools:
            raise ConfigError(describe("pool", pool, ", ".join(self.pools) or "none: no experts"))
        if not 0 <= index < len(self.pools[pool]):
            raise ConfigError(describe("index", index, f"0..{len(self.pools[pool]) - 1}"))
        return self.pools[pool][index]


def load_manifest(path: str | Path) -> Manifest:
    """Read and check ``manifest.json``, without weights. CheckpointError if it is invalid."""
    path = Path(path)
    data = read_manifest(path, FORMAT, VERSION)
    try:
        parsed = _ManifestFile.from_dict(data)
    except ConfigError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from None
    listed = [*parsed.members, *(name for names in parsed.pools.values() for name in names)]
    for name in listed:
        if name not in parsed.files:
            raise CheckpointError(f"{path / MANIFEST}: expert file {name!r} is not among its files")
    if len(set(listed)) < len(listed):
        raise CheckpointError(f"{path / MANIFEST}: one file is listed for two experts")
    fields = {name: getattr(parsed, name) for name in _ManifestFile.model_fields}
    del fields["format"], fields["version"]
    return Manifest(path=path, **fields)


def verify(path: str | Path) -> Manifest:
    """Check every file of a model directory against its manifest."""
    manifest = load_manifest(path)
    for name in manifest.files:
        manifest.file(name)
    return manifest


@runtime_checkable
class Pool(Protocol):
    """Stacked experts that can give and take one expert at a time."""

    num_experts: int

    def expert_state(self, expert: int) -> dict[str, Tensor]: ...

    def load_expert_state(self, expert: int, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Split:
    """A model's tensors by file; every tensor is in exactly one.

    ``members``: file -> tensors of each network of an ensemble, under the member's names.
    """

    trunk: dict[str, Tensor]
    router: dict[str, Tensor]
    pools: dict[str, Pool]
    members: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def split(model: nn.Module, borrowed: bool = False) -> Split:
    """Sort parameters and persistent buffers into trunk, routers and pools of experts.

    Pools that share their tensors are stored once. Each network of an ensemble is split separately,
    so that its files are complete. ``borrowed``: include tensors that belong to another model.
    """
    if isinstance(model, Ensemble):
        return _split_ensemble(model)
    everything = module_tensors(model, borrowed)
    owners = {id(value): name for name, value in everything.items()}
    pools: dict[str, Pool] = {}
    stacked: set[str] = set()
    routed: set[str] = set()
    for path, module in model.named_modules():
        if is_borrowed(module) and not borrowed:
            continue
        own = module_tensors(module, borrowed)
        if isinstance(module, Pool):
            names = {owners[id(own[name])] for name in module.expert_state(0)}
            if not names <= stacked:
                pools[path or type(model).__name__] = module
                stacked |= names
        elif isinstance(module, Router):
            routed |= {owners[id(value)] for value in own.values()}
    routed -= stacked
    return Split(
        trunk={n: v for n, v in everything.items() if n not in stacked and n not in routed},
        router={n: v for n, v in everything.items() if n in routed},
        pools=pools,
    )


def _split_ensemble(model: Ensemble) -> Split:
    out = Split({}, {}, {})
    for index, network in enumerate(model.networks):
        parts = split(network, borrowed=True)
        out.members[member_name(index)] = {**parts.trunk, **parts.router}
        out.pools.update({f"networks.{index}.{path}": pool for path, pool in parts.pools.items()})
    for owner, module in deciders(model).items():
        parts = split(module)
        own = {**parts.trunk, **parts.router}
        out.router.update({f"{owner}.{name}": value for name, value in own.items()})
        out.pools.update({f"{owner}.{path}": pool for path, pool in parts.pools.items()})
    return out


def deciders(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that weigh the members of an ensemble: its router and aggregators."""
    found = {name: getattr(model, name, None) for name in ("router", "aggregators")}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def member_name(index: int) -> str:
    """File of one network of an ensemble."""
    return f"{MEMBERS}/{index:02d}.safetensors"


def expert_name(pool: str, index: int) -> str:
    """File of one expert. Module paths have no separators, so they are folder names as they are."""
    return f"{EXPERTS}/{pool}/e{index:03d}.safetensors"


def model_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a configuration that describes a registered model; None if there is none."""
    for candidate in (config, config.get("model")):
        if isinstance(candidate, Mapping) and isinstance(candidate.get("kind"), str):
            return dict(candidate)
    return None
