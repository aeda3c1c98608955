"""What an adapter is, as configuration."""

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
    """dW = scale * up down of every linear map and convolution whose path fits ``targets`` (shell
    patterns; ``*`` also matches dots). Nothing changes at the start: the trained factor is zero, or
    one of the two trained factors is (LoRA, arXiv:2106.09685).

    ``basis`` None: both factors are trained. ``embeddings`` and ``rows``: these rows of these
    embedding tables are trained too, such as the token of a new concept.

    ``conv``: what is of low rank in a convolution of kernel k x k. ``channels``: down is a
    convolution to ``rank`` channels (PEFT). ``kernel``: the kernel read as a matrix [O k, I k] is
    of rank ``rank`` k, up [O k, r k] and down [r k, I k] (loralib). ``narrow``: a module with fewer
    inputs or outputs than ``rank`` is an error, or gets the lower rank.

    ``experts``: stacks of maps [E, out, in] (patterns of parameter paths, such as ``*.pool.*``), of
    which each expert gets factors of its own. They are no modules, so ``targets`` cannot name them.

    ``ranks`` and ``alphas``: modules among the targets (patterns) that have another rank or alpha;
    the first pattern that fits holds.

    ``biases``: modules whose biases are trained along. ``copies``: modules of which the adapter has
    its own, starting as they are and trained whole: a batch norm with its statistics, or, with
    ``*``, all of the network. On or off, and only one copy of a module at a time.
    """

    targets: tuple[str, ...] = ("*",)
    rank: PositiveInt = 4
    alpha: float | None = Field(None, gt=0)  # None: rank, so that scale is 1
    rank_scaling: bool = False  # divide alpha by sqrt(rank) instead of rank (arXiv:2312.03732)
    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    basis: BasisConfig | None = None
    embeddings: tuple[str, ...] = ()
    rows: tuple[NonNegativeInt, ...] = ()
    conv: Literal["channels", "kernel"] = "channels"
    narrow: Literal["refuse", "lower"] = "refuse"
    experts: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

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
        """Of a module without a rank or alpha of its own."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, path: str) -> int:
        """The rank that is wanted in the module at ``path``."""
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
    """One adapter of a model: a new one (``lora``), which is trained, or that of a run or a folder
    in PEFT's layout (``path``), which stays as it is. ``weight``: how much of it is added; rows of
    embeddings come whole."""

    name: Name
    lora: LoraConfig | None = None
    path: Annotated[Place, Field(min_length=1)] | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterConfig:
        if (self.lora is None) == (self.path is None):
            raise ConfigError(describe("path", self.path, "a path, or lora for a new adapter"))
        return self
