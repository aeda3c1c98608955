"""The denoiser contract: ``denoiser(x, t, cond) -> Prediction``; and what it is asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError, describe
from coterie.core.records import replaced
from coterie.core.routing import Aux, Routing

View = Literal["x0", "eps", "score", "flow", "v", "logits"]
VIEWS: tuple[str, ...] = ("x0", "eps", "score", "flow", "v")
"""x0: clean data. eps: noise. score: grad log p. flow: dx/dt. v: alpha*eps - sigma*x0."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a denoiser answers: a tensor of x's shape, which view it is, and how it was made."""

    value: Tensor
    view: View
    routings: tuple[Routing, ...] = ()
    aux: tuple[Aux, ...] = ()
    variance: Tensor | None = None
    """Learned variance, x's shape: -1 = posterior variance, +1 = forward variance (log-linear)."""
    visible: Tensor | None = None
    """Which parts of x the network saw in masked training, bool [B, ...]; None: all of it."""
    weight_rate: Tensor | None = None
    """f64 [B]: change of log weight per unit of lam of a particle that follows this answer, where
    the answer alone does not sample what it stands for (Feynman-Kac correctors)."""

    def replace(self, **changes: Any) -> Self:
        return replaced(self, changes)


@dataclass(frozen=True, eq=False)
class Condition:
    """One record for every application. All tensors have the batch as first dimension.

    ``static`` names the fields that do not depend on x or t (hence cacheable); all are by default.
    ``keep`` names those that an unconditional sample has nevertheless.
    """

    label: Tensor | None = None  # i64 [B], NULL_LABEL = unconditional
    vector: Tensor | None = None  # [B, V]
    tokens: Tensor | None = None  # [B, M, C]
    tokens_mask: Tensor | None = None  # bool [B, M]
    channels: Tensor | None = None  # [B, C, ...], concatenated to x
    keys_values: Tensor | None = None  # [B, 2, L, M, D], reference keys and values per layer
    task: Tensor | None = None  # i64 [B], a hard index (task, view, modality)
    likelihood: Any = None  # callable (x0, ids) -> log p(y | x0), [B]
    null: Mapping[str, Tensor] = field(default_factory=dict)  # field -> its null row, [...]
    keep: frozenset[str] = frozenset({"task"})
    static: frozenset[str] = frozenset(
        {"label", "vector", "tokens", "tokens_mask", "channels", "keys_values", "task"}
    )

    def tensors(self) -> dict[str, Tensor]:
        out = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                out[item.name] = value
        return out

    def replace(self, **changes: Any) -> Self:
        return replaced(self, changes)

    def map(self, fn: Any) -> Self:
        """Apply ``fn`` to every tensor field."""
        return self.replace(**{name: fn(value) for name, value in self.tensors().items()})

    def index(self, rows: Tensor) -> Self:
        return self.map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda value: value.to(device))

    def drop(self, rows: Tensor) -> Self:
        """The null condition where ``rows`` (bool [B]) is True: what classifier-free guidance
        trains on. Labels become NULL_LABEL; other fields become their row of ``null`` (or 0);
        those in ``keep`` stay."""
        changes = {}
        for name, value in self.tensors().items():
            if name in self.keep:
                continue
            where = rows.reshape(-1, *[1] * (value.dim() - 1))
            if name == "label":
                changes[name] = torch.where(where, torch.full_like(value, NULL_LABEL), value)
            else:
                empty = self.null.get(name, torch.zeros_like(value[:1]))
                changes[name] = torch.where(where, empty.to(value), value)
        return self.replace(**changes)

    def as_null(self, batch: int) -> Self:
        """Every row unconditional."""
        first = next(iter(self.tensors().values()), None)
        device = None if first is None else first.device
        return self.drop(torch.ones(batch, dtype=torch.bool, device=device))

    @staticmethod
    def cat(first: Condition, second: Condition) -> Condition:
        """Stack two conditions with the same fields along the batch."""
        other = second.tensors()
        return first.replace(
            **{name: torch.cat([value, other[name]]) for name, value in first.tensors().items()}
        )


@runtime_checkable
class DenoiserLike(Protocol):
    """Anything a solver can use: a network, or several composed."""

    process: Any  # coterie.process.Process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """x [B, ...], t f32 [B] in the process's time, -> a prediction of x's shape."""
        ...


def check_times(t: Tensor, batch: int) -> None:
    """DataError unless there is one time per sample: t [B]."""
    if t.shape != (batch,):
        raise DataError(describe("t", tuple(t.shape), f"[B] with B = {batch}"))
