"""Shared bases for adapters that are trained separately and added up later.

A public basis of R^m, computed from a seed, is divided into slots of ``rank`` directions; each
adapter is trained in its own slot. Updates in different slots are orthogonal, ``dW_i dW_j^T = 0``,
without joint training (Po et al., arXiv:2312.02432).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.folder import digest
from coterie.core.rng import numpy_generator

VERSION = 1
PROBE = 64  # width whose numbers stand in the hash


class BasisConfig(Config):
    """A slot of a shared basis, to which an adapter is confined."""

    kind: Literal["orthogonal", "gaussian"] = "orthogonal"
    """``orthogonal``: an orthonormal basis. ``gaussian``: rows N(0, 1/m) drawn per slot; any number
    of slots, orthogonal in expectation only (E |B_i^T B_j|_F^2 = r^2 / m)."""
    seed: int = Field(0, ge=0, lt=2**63)  # of the basis
    index: int = Field(0, ge=0, lt=2**63)  # number of the slot
    side: Literal["input", "output"] = "input"
    """whether the frozen factor reads the input (as published) or writes the output"""

    @property
    def hash(self) -> str:
        """Hash of the basis without the slot; adapters that are added up must have the same.

        Computed from rounded draws, so that it is equal on machines with different linear algebra.
        """
        draws = np.rint(_draws(self.kind, self.seed, PROBE, 0) * 1e6).astype(np.int64)
        fields = self.model_dump(mode="json", exclude={"index"})
        return digest({"version": VERSION, **fields, "draws": draws.ravel().tolist()})[:16]

    def directions(self, width: int, rank: int) -> Tensor:
        """The frozen factor f32 [rank, width].

        With ``orthogonal`` its rows are orthonormal, and orthogonal to those of other slots.
        ConfigError if the slot does not exist.
        """
        check_capacity(self, width, rank)
        if self.kind == "gaussian":
            rows = _draws(self.kind, self.seed, width, self.index, rank) / width**0.5
            return torch.from_numpy(rows).float()
        first = self.index * rank
        return torch.from_numpy(_orthogonal(self.seed, width)[first : first + rank]).float()


def capacity(basis: BasisConfig | None, width: int, rank: int) -> int | None:
    """Number of slots of ``rank`` directions in a basis of R^width; None: no limit."""
    return width // rank if basis is not None and basis.kind == "orthogonal" else None


def check_capacity(basis: BasisConfig, width: int, rank: int, where: str = "") -> None:
    """ConfigError where m * r exceeds the width."""
    room = capacity(basis, width, rank)
    if room is not None and basis.index >= room:
        hint = f"{room} adapters of rank {rank} fit the width {width}{where and f' of {where}'}"
        allowed = f"0..{room - 1}" if room else "no slot"
        hint += (
            "; take a smaller rank, or kind gaussian, whose bases are orthogonal only on average"
        )
        raise ConfigError(describe("basis.index", basis.index, allowed, hint))


def _draws(kind: str, seed: int, width: int, index: int, rows: int | None = None) -> np.ndarray:
    """Standard normal f64 [rows or width, width]."""
    rng = numpy_generator(seed, "basis", VERSION, kind, width, index)
    return rng.standard_normal((rows or width, width))


@lru_cache(maxsize=64)
def _orthogonal(seed: int, width: int) -> np.ndarray:
    """Orthogonal f64 [width, width], uniform over all: QR with the signs of R's diagonal."""
    q, r = np.linalg.qr(_draws("orthogonal", seed, width, 0))
    matrix: np.ndarray = (q * np.sign(np.diag(r))).T.copy()
    return matrix
