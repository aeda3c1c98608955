"""What a data source yields and what an objective answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from coterie.core.prediction import Condition
from coterie.core.routing import Aux, Routing


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples: ``x`` f32 [B, ...] in about [-1, 1] (or i64 [B, N]: token ids, feature ids)."""

    x: Tensor
    cond: Condition
    ids: Tensor  # i64 [B], index of each sample in its source
    targets: Tensor | None = None  # f32 [B, T], an answer per task, NaN = not known


@runtime_checkable
class Source(Protocol):
    """A finite, indexable data set. ``get`` is a pure function of the indices.

    Class-conditional sources put the class in ``Batch.cond.label``.
    """

    name: str
    modality: str  # "image", "text", "vector", "points", "ratings"
    shape: tuple[int, ...]  # of one sample, without the batch
    num_classes: int  # 0 = no labels
    class_names: tuple[str, ...]
    licence: str

    def __len__(self) -> int: ...

    def get(self, indices: Any) -> Batch:
        """``indices``: 1-D integer array; raises DataError on non-finite data."""
        ...


@dataclass(frozen=True, eq=False)
class Losses:
    """What an objective answers. ``total`` is what training minimises."""

    main: dict[str, Tensor]  # named scalar losses, already weighted
    aux: tuple[Aux, ...] = ()
    routings: tuple[Routing, ...] = ()
    per_sample: Tensor | None = None  # [B], unweighted, detached: for noise-level bins
    noise: Tensor | None = None  # [B], where each sample was evaluated, in [0, 1]
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        parts = [*self.main.values(), *(item.weight * item.value for item in self.aux)]
        return torch.stack([part.float() for part in parts]).sum()


class Objective(Protocol):
    """All the training loop knows about what is being learnt.

    What it draws or sums for the batch it draws and sums by :mod:`coterie.core.share`: ``rng`` is
    the same for every part of a batch, in micro-batches as in several processes.
    """

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float) -> Losses: ...
