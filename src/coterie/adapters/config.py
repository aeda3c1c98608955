"""Configuration of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from coterie.adapters.basis import BasisConfig
from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.paths import Place

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class LoraConfig(Config):
    """A low-rank adapter: dW = scale * up down for linear maps and convolutions (LoRA,
    arXiv:2106.09685).

    One trained factor starts at zero, so nothing changes at the start. Patterns are shell patterns
    of paths, in which ``*`` also matches dots.
    """

    targets: tuple[str, ...] = ("*",)  # patterns of the modules that get the adapter
    rank: PositiveInt = 4  # rank of dW
    alpha: float | None = Field(None, gt=0)  # scale is alpha / rank; null: rank, so scale is 1
    rank_scaling: bool = False  # divide alpha by sqrt(rank) instead of rank (arXiv:2312.03732)
    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    """pattern -> another rank for those targets; the first match holds"""
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """pattern -> another alpha for those targets; the first match holds"""
    basis: BasisConfig | None = None
    """confine one factor to a shared basis; null: both factors are trained"""
    embeddings: tuple[str, ...] = ()
    """embedding tables of which ``rows`` are trained, such as a new token"""
    rows: tuple[NonNegativeInt, ...] = ()  # the trained rows of these tables
    conv: Literal["channels", "kernel"] = "channels"
    """In convolutions of kernel k x k: ``channels``: down is a convolution to ``rank`` channels
    (PEFT). ``kernel``: the kernel as a matrix [O k, I k] has rank ``rank`` k (loralib)."""
    narrow: Literal["refuse", "lower"] = "refuse"
    """modules narrower than ``rank``: an error, or a lower rank"""
    experts: tuple[str, ...] = ()
    """Patterns of stacked expert matrices [E, out, in], such as ``*.pool.*``; each expert gets its
    own factors. ``targets`` cannot name them, as they are no modules."""
    biases: tuple[str, ...] = ()  # patterns of modules whose biases are trained too
    copies: tuple[str, ...] = ()
    """Patterns of modules that the adapter replaces by a fully trained copy, such as batch norms
    with their statistics; ``*``: the whole network. Such a copy is on or off, one at a time."""

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if bool(self.embeddings) != bool(self.rows):
            raise ConfigError(describe("rows", self.rows, "rows of embeddings, or neither"))
        if len(set(self.rows)) < len(self.rows):
            raise ConfigError(describe("rows", self.rows, "rows that all differ"))
        if not any((self.targets, self.embeddings, self.experts, self.biases, self.copies)):
            raise ConfigError(describe("targets", (), "patterns of module paths"))
        if self.basis is not None and self.experts:
            hint = "slots lie in the inputs of a map that all samples share"
            raise ConfigError(describe("experts", self.experts, "none with a basis", hint))
        if self.basis is not None and (self.conv, self.narrow) != ("channels", "refuse"):
            hint = "a basis has slots of one rank in the space of a module's inputs"
            found = f"conv {self.conv}, narrow {self.narrow}"
            raise ConfigError(describe("basis", found, "conv channels, narrow refuse", hint))
        if self.basis is not None and self.ranks:
            hint = "the slots of a basis are of one rank"
            raise ConfigError(describe("ranks", self.ranks, "none with a basis", hint))
        return self

    @property
    def scale(self) -> float:
        """Scale of modules without a rank or alpha of their own."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, path: str) -> int:
        """The rank for the module at ``path``."""
        rank: int = _first(self.ranks, path, self.rank)
        return rank

    def scale_of(self, path: str) -> float:
        return self._scale(self.rank_of(path), _first(self.alphas, path, self.alpha))

    def _scale(self, rank: int, alpha: float | None) -> float:
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.rank_scaling else rank)


def _first(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    found = (value for pattern, value in patterns.items() if fnmatchcase(path, pattern))
    return next(found, otherwise)


class AdapterConfig(Config):
    """One adapter of a run: a new one that is trained, or a trained one."""

    name: Name  # of the adapter
    lora: LoraConfig | None = None  # a new adapter
    path: Annotated[Place, Field(min_length=1)] | None = None
    """A trained adapter: a run, or a folder in PEFT's layout; it is not trained further."""
    weight: float = 1.0  # factor of the adapter; trained rows of embeddings ignore it

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterConfig:
        if (self.lora is None) == (self.path is None):
            raise ConfigError(describe("path", self.path, "a path, or lora for a new adapter"))
        return self
