"""The denoiser contract: ``denoiser(x, t, cond) -> Prediction``; and what it is asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    references: Tensor | None = None  # [B, R, ...], samples that x is to be made after
    reference_kinds: Tensor | None = None  # i64 [B, R], what each of them shows; -1 = none there
    keys_values: Tensor | None = None  # [B, 2, L, M, D], reference keys and values per layer
    keys_mask: Tensor | None = None  # bool [B, M], False = nobody may attend to it
    task: Tensor | None = None  # i64 [B], a hard index (task, view, modality)
    guidance: Tensor | None = None  # f32 [B], weight of guidance, where samples differ in it
    likelihood: Any = None  # callable (x0, ids) -> log p(y | x0), [B]
    null: Mapping[str, Tensor] = field(default_factory=dict)  # field -> its null row, [...]
    unconditional: Condition | None = None  # the null form where it was worked out beforehand
    keep: frozenset[str] = frozenset({"task", "reference_kinds", "guidance"})
    static: frozenset[str] = frozenset(
        {"label", "vector", "tokens", "tokens_mask", "channels", "references", "reference_kinds"}
        | {"keys_values", "keys_mask", "task", "guidance"}
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
        """Apply ``fn`` to every tensor field, those of the null form too."""
        changes = {name: fn(value) for name, value in self.tensors().items()}
        null = self.unconditional
        return self.replace(**changes, unconditional=None if null is None else null.map(fn))

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
        if self.unconditional is not None:
            return self.unconditional  # type: ignore[return-value]
        first = next(iter(self.tensors().values()), None)
        device = None if first is None else first.device
        return self.drop(torch.ones(batch, dtype=torch.bool, device=device))

    @cached_property
    def with_null(self) -> Condition:
        """[2B]: as it is, then every row unconditional. Made once, for all steps of a run."""
        batch = len(next(iter(self.tensors().values())))
        return Condition.cat(self, self.as_null(batch))

    @staticmethod
    def cat(first: Condition, second: Condition) -> Condition:
        """Stack two conditions with the same fields along the batch."""
        other = second.tensors()
        nulls = [cond.unconditional for cond in (first, second)]
        both = None if None in nulls else Condition.cat(*nulls)  # type: ignore[arg-type]
        return first.replace(
            **{name: torch.cat([value, other[name]]) for name, value in first.tensors().items()},
            unconditional=both,
        )


@runtime_checkable
class DenoiserLike(Protocol):
    """Anything a solver can use: a network, or several composed."""

    process: Any  # coterie.process.Process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """x [B, ...], t f32 [B] in the process's time, -> a prediction of x's shape."""
        ...


def as_times(t: Tensor | float, x: Tensor) -> Tensor:
    """One time per sample of x: t [B]; a number is the time of all. DataError for all else."""
    if not isinstance(t, Tensor):
        if isinstance(t, bool) or not isinstance(t, int | float):
            raise DataError(describe("t", t, "a number, or a tensor [B]"))
        return torch.full((x.shape[0],), float(t), device=x.device)
    if t.shape != x.shape[:1]:
        raise DataError(describe("t", tuple(t.shape), f"[B] with B = {x.shape[0]}"))
    return t


def as_condition(cond: Condition | None) -> Condition:
    """No condition is the empty one. DataError for what is none."""
    if cond is None:
        return Condition()
    if not isinstance(cond, Condition):
        hint = "a label is Condition(label=tensor)"
        raise DataError(describe("cond", type(cond).__name__, "a Condition, or None", hint))
    return cond
