"""What a data source yields (:class:`Batch`) and what an objective returns (:class:`Losses`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from coterie.core.prediction import Condition
from coterie.core.routing import Aux, Routing


@dataclass(frozen=True, eq=False)
class Batch:
    """A training batch of B samples."""

    x: Tensor  # f32 [B, ...] in about [-1, 1]; or i64 [B, N], token or feature ids
    cond: Condition  # the condition of each sample: label, text, ...
    ids: Tensor  # i64 [B], index of each sample in its source
    targets: Tensor | None = None  # f32 [B, T], a label per task; NaN where it is missing


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
        """The samples at ``indices``, a 1-D integer array. DataError if the data are not finite."""
        ...


@dataclass(frozen=True, eq=False)
class Losses:
    """What an objective returns for a batch. Training minimises ``total``."""

    main: dict[str, Tensor]  # named scalar losses, already weighted
    aux: tuple[Aux, ...] = ()  # auxiliary losses, such as load balance; not yet weighted
    routings: tuple[Routing, ...] = ()  # of every expert layer in the pass
    per_sample: Tensor | None = None  # [B], unweighted, detached: for noise-level bins
    noise: Tensor | None = None  # [B], noise level of each sample, in [0, 1]
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Scalar f32: the sum of ``main`` and of the weighted ``aux``."""
        parts = [*self.main.values(), *(item.weight * item.value for item in self.aux)]
        return torch.stack([part.float() for part in parts]).sum()


class Objective(Protocol):
    """Computes the losses of a model on a batch: ``objective(model, batch, rng, progress)``.

    ``progress`` is the share of training that is done, in [0, 1]. ``rng`` is the same for every
    micro-batch and process of a step, so an objective draws random numbers, and sums over the
    batch, with the functions of :mod:`coterie.core.share`.
    """

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float) -> Losses: ...
