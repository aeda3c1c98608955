"""The denoiser contract, ``denoiser(x, t, cond) -> Prediction``, and the condition."""

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
    """What a denoiser returns: a tensor of x's shape and the view it is in."""

    value: Tensor  # of x's shape; logits [B, N, V] for tokens
    view: View  # what ``value`` is: x0, eps, score, flow, v or logits
    routings: tuple[Routing, ...] = ()  # of every expert layer in the pass
    aux: tuple[Aux, ...] = ()  # auxiliary losses of the pass
    variance: Tensor | None = None
    """Learned variance, x's shape, in [-1, 1]: -1 is the posterior variance, +1 the forward
    variance; in between their logarithms are interpolated."""
    visible: Tensor | None = None
    """Which parts of x the network saw in masked training, bool [B, ...]; None: all of it."""
    weight_rate: Tensor | None = None
    """f64 [B]: for Feynman-Kac particles, the change of a particle's log weight per unit of lam =
    log(alpha / sigma). Set by products and tilts of densities, whose score alone does not sample
    the wanted density."""

    def replace(self, **changes: Any) -> Self:
        return replaced(self, changes)


@dataclass(frozen=True, eq=False)
class Condition:
    """What samples are conditioned on. All tensors have the batch as first dimension.

    Classifier-free guidance compares a condition with its null form (:meth:`drop`,
    :meth:`as_null`), in which the fields of ``keep`` stay. ``static`` names the fields that do not
    depend on x or t, so that work on them can be cached; by default all of them.
    """

    label: Tensor | None = None  # i64 [B], NULL_LABEL = unconditional
    vector: Tensor | None = None  # [B, V], any vector
    tokens: Tensor | None = None  # [B, M, C], such as encoded text or observations
    tokens_mask: Tensor | None = None  # bool [B, M]
    channels: Tensor | None = None  # [B, C, ...], concatenated to x
    references: Tensor | None = None  # [B, R, ...], reference samples that x attends to
    reference_kinds: Tensor | None = None
    """i64 [B, R], kind of each reference; -1 = no reference there"""
    keys_values: Tensor | None = None  # [B, 2, L, M, D], reference keys and values per layer
    keys_mask: Tensor | None = None  # bool [B, M], False = that token is not attended to
    task: Tensor | None = None  # i64 [B], index of the task, view or modality
    guidance: Tensor | None = None  # f32 [B], guidance weight of each sample, if they differ
    likelihood: Any = None  # callable (x0, ids) -> log p(y | x0), [B]
    null: Mapping[str, Tensor] = field(default_factory=dict)  # field -> its null row, [...]
    unconditional: Condition | None = None  # the null form, if it was computed beforehand
    keep: frozenset[str] = frozenset({"task", "reference_kinds", "guidance"})
    static: frozenset[str] = frozenset(
        {"label", "vector", "tokens", "tokens_mask", "channels", "references", "reference_kinds"}
        | {"keys_values", "keys_mask", "task", "guidance"}
    )

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are set, by name."""
        out = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                out[item.name] = value
        return out

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replaced(self, changes)

    def map(self, fn: Any) -> Self:
        """Apply ``fn`` to every tensor field, those of ``unconditional`` too."""
        changes = {name: fn(value) for name, value in self.tensors().items()}
        null = self.unconditional
        return self.replace(**changes, unconditional=None if null is None else null.map(fn))

    def index(self, rows: Tensor) -> Self:
        """The condition of some samples; ``rows`` i64 or bool [B]."""
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
        """The null form: all samples unconditional; ``batch`` is their number B."""
        if self.unconditional is not None:
            return self.unconditional  # type: ignore[return-value]
        first = next(iter(self.tensors().values()), None)
        device = None if first is None else first.device
        return self.drop(torch.ones(batch, dtype=torch.bool, device=device))

    @cached_property
    def with_null(self) -> Condition:
        """This condition, then its null form, stacked: [2B]. Computed once and kept."""
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
    """A time per sample, t [B]; a number is used for all samples. DataError for other shapes."""
    if not isinstance(t, Tensor):
        if isinstance(t, bool) or not isinstance(t, int | float):
            raise DataError(describe("t", t, "a number, or a tensor [B]"))
        return torch.full((x.shape[0],), float(t), device=x.device)
    if t.shape != x.shape[:1]:
        raise DataError(describe("t", tuple(t.shape), f"[B] with B = {x.shape[0]}"))
    return t


def as_condition(cond: Condition | None) -> Condition:
    """``cond``, or an empty Condition for None. DataError for any other type."""
    if cond is None:
        return Condition()
    if not isinstance(cond, Condition):
        hint = "a label is Condition(label=tensor)"
        raise DataError(describe("cond", type(cond).__name__, "a Condition, or None", hint))
    return cond
