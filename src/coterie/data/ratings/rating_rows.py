"""Ratings as rows of feature ids, with one label per task.

A source of modality "ratings" yields ``x`` i64 [B, C], the columns of its ``fields`` (a field of
several columns is a set; -1 marks unused columns), and ``targets`` f32 [B, T], 1 or 0 per task and
NaN where the label is missing. Legend: S samples, C columns, T tasks, U users.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, DataError, describe, unknown
from coterie.core.numbers import Seed
from coterie.core.prediction import Condition
from coterie.core.rng import numpy_generator
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, as_rows

NOTHING = -1
"""Fills the columns of a field that holds fewer values than it has room for."""


@dataclass(frozen=True)
class Feature:
    """A categorical field: ids 0..size-1, up to ``columns`` of them in a sample."""

    name: str
    size: int
    columns: int = 1


class RatingSource:
    """Samples S of one split. ``features`` i64 [S, C] in the order of ``fields``; ``targets`` f32
    [S, T]; ``users`` i64 [S], whom a sample is of; ``tell(index)`` names a sample for people."""

    modality = "ratings"
    num_classes = 0
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        fields: Sequence[Feature],
        features: np.ndarray,
        targets: np.ndarray,
        task_names: Sequence[str],
        users: np.ndarray,
        *,
        licence: str,
        tell: Callable[[int], str] | None = None,
    ) -> None:
        self.name, self.licence = name, licence
        self.fields, self.task_names = tuple(fields), tuple(task_names)
        self.shape: tuple[int, ...] = (sum(field.columns for field in fields),)
        self.users = users
        self.tell = tell or (lambda index: f"user {users[index]}, sample {index}")
        self._features, self._targets = features, targets
        check_ids(name, self.fields, features)
        if targets.shape != (len(features), len(self.task_names)):
            allowed = f"({len(features)}, {len(self.task_names)})"
            raise DataError(describe(f"{name}: targets", targets.shape, allowed))
        check_answers(targets, self.task_names, name)

    def __len__(self) -> int:
        return len(self._features)

    def get(self, indices: Any) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        return Batch(
            torch.from_numpy(self._features[rows].astype(np.int64)),
            Condition(),
            torch.from_numpy(rows),
            torch.from_numpy(self._targets[rows].astype(np.float32)),
        )


def check_ids(name: str, fields: Sequence[Feature], features: np.ndarray) -> None:
    """DataError naming the first field with an id that it does not have."""
    columns = sum(field.columns for field in fields)
    if features.ndim != 2 or features.shape[1] != columns:
        raise DataError(describe(f"{name}: features", features.shape, f"[S, {columns}]"))
    first = 0
    for field in fields:
        values = features[:, first : first + field.columns]
        first += field.columns
        least = 0 if field.columns == 1 else NOTHING
        wrong = (values < least) | (values >= field.size)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            where = f"{name}: field {field.name!r} of sample {row}"
            raise DataError(describe(where, int(values[row, column]), f"{least}..{field.size - 1}"))


def check_answers(targets: np.ndarray | Tensor, task_names: Sequence[str], name: str) -> None:
    """DataError naming the first answer of ``targets`` [S, T] that is not 0, 1 or NaN: -1 for "not
    known" or a mistyped 2 would be learnt as if it were one."""
    wrong = ~((targets == 0) | (targets == 1) | (targets != targets))
    if wrong.any():
        row, task = (int(index) for index in torch.as_tensor(wrong).nonzero()[0])
        field = f"{name}: answer of sample {row} to task {task_names[task]!r}"
        raise DataError(describe(field, float(targets[row, task]), "0, 1, or NaN where not known"))


def check_users(name: str, users: np.ndarray, num_users: int, least: int) -> None:
    """DataError naming the first of ``num_users`` users with fewer than ``least`` ratings."""
    counts = np.bincount(users, minlength=num_users)
    few = np.flatnonzero(counts < least)
    if few.size:
        have = "no ratings" if counts[few[0]] == 0 else f"only {counts[few[0]]} ratings"
        raise DataError(
            f"{name}: user {few[0]} has {have}; allowed: users with {least} or more, so that "
            "every part of the split has one; drop the user"
        )


def time_split(users: np.ndarray, times: np.ndarray, share: float = 0.1) -> np.ndarray:
    """u8 [S]: 0 train, 1 validation, 2 test. Of each user the latest ``share`` of the ratings is
    the test part and the ``share`` before it validation; each has one at least. Ratings of one
    moment keep the order in which they are given."""
    part = np.zeros(len(users), dtype=np.uint8)
    order = np.lexsort((np.arange(len(users)), times, users))
    edges = np.flatnonzero(np.diff(users[order], prepend=-1, append=-1))
    for begin, end in pairwise(edges):
        count = max(1, int(share * (end - begin)))
        part[order[end - count : end]] = 2
        part[order[end - 2 * count : end - count]] = 1
    return part


_TASK = re.compile(r"(ge|le|eq)([1-5])")


def rating_task(name: str, ratings: np.ndarray) -> np.ndarray:
    """f32 [S]: whether a rating of 1..5 is at least (``ge4``), at most (``le2``) or exactly
    (``eq5``) a number; ConfigError for another name."""
    match = _TASK.fullmatch(name)
    if match is None:
        raise ConfigError(describe("tasks", name, "ge1..ge5, le1..le5, eq1..eq5"))
    number = int(match[2])
    compare = {"ge": np.greater_equal, "le": np.less_equal, "eq": np.equal}[match[1]]
    return compare(ratings, number).astype(np.float32)


def chosen_fields(names: Sequence[str], fields: Sequence[Feature]) -> list[Feature]:
    """The fields called ``names``, in that order; ConfigError for one that there is not."""
    known = {field.name: field for field in fields}
    for name in names:
        if name not in known:
            raise ConfigError(unknown("features", name, known))
    if len(set(names)) < len(names) or not names:
        raise ConfigError(describe("features", list(names), "one or more different names"))
    return [known[name] for name in names]


@SOURCES.register
class TaskToyConfig(SourceConfig):
    """Synthetic ratings: a task's score is ``<w_t, u * i>`` of user and item, plus logistic
    noise."""

    kind: Literal["task-toy"] = "task-toy"
    count: int = Field(default=20_000, ge=40, le=10_000_000)  # training samples
    users: int = Field(default=200, ge=2)  # number of users
    items: int = Field(default=300, ge=2)  # number of items
    rank: int = Field(default=8, ge=1)  # of the hidden vectors of users and items
    correlation: float = Field(default=0.5, ge=0, le=1)  # mean correlation of two tasks' scores
    positive: tuple[float, ...] = Field(default=(0.5, 0.3, 0.1, 0.03), min_length=1)
    """share of label 1, per task"""
    observed: tuple[float, ...] | None = None
    """share of training samples with a label, per task; null: all"""
    noise: float = Field(default=0.3, ge=0)  # of the labels, relative to the scores
    seed: Seed = 0  # of the data
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Drawn users and items; tasks as correlated and as sparse as wanted",
        modality="ratings",
        shape="3 ids",
        count="any (20000 + 5000)",
        licence="none needed: generated",
    )

    @model_validator(mode="after")
    def _shares(self) -> Self:
        for name, values in (("positive", self.positive), ("observed", self.observed)):
            if values is not None and not all(0 < value <= 1 for value in values):
                raise ConfigError(describe(name, values, "shares above 0, at most 1"))
        if max(self.positive) >= 1:
            raise ConfigError(describe("positive", self.positive, "below 1: both answers occur"))
        if self.observed is not None and len(self.observed) != len(self.positive):
            allowed = f"{len(self.positive)} shares, one per task"
            raise ConfigError(describe("observed", self.observed, allowed))
        if self.count < 4 * self.users:
            hint = "users without ratings cannot be judged"
            raise ConfigError(describe("count", self.count, f"{4 * self.users} or more", hint))
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(f"task{number}" for number in range(len(self.positive)))

    @property
    def fields(self) -> tuple[Feature, ...]:
        """``group`` is a coarse fact about the item."""
        return Feature("user", self.users), Feature("item", self.items), Feature("group", 4)

    def task_weights(self) -> np.ndarray:
        """f64 [T, rank], length sqrt(rank): what each task looks for."""
        rng = numpy_generator(self.seed, self.kind, "weights")
        common, own = rng.normal(size=self.rank), rng.normal(size=(len(self.positive), self.rank))
        c = self.correlation
        mixed = np.sqrt(c) * common + np.sqrt(1 - c) * own
        length = np.linalg.norm(mixed, axis=1, keepdims=True)
        weights: np.ndarray = mixed / length * np.sqrt(self.rank)
        return weights

    def build(self, split: Split = "train") -> RatingSource:
        world = numpy_generator(self.seed, self.kind, "world")
        user = world.normal(size=(self.users, self.rank))
        item = world.normal(size=(self.items, self.rank))

        def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            users = rng.permutation(np.arange(count) % self.users)  # none is without ratings
            items = rng.integers(self.items, size=count)
            scores = (user[users] * item[items]) @ self.task_weights().T / np.sqrt(self.rank)
            return users, items, scores + self.noise * rng.logistic(size=scores.shape)

        # The same bars in both splits.
        shown = draw(self.count, numpy_generator(self.seed, self.kind, "bars"))[2]
        bars = np.quantile(shown, 1 - np.array(self.positive), axis=0).diagonal()
        rng = numpy_generator(self.seed, self.kind, split)
        users, items, scores = draw(self.count if split == "train" else self.count // 4, rng)
        targets = (scores > bars).astype(np.float32)
        if self.observed is not None and split == "train":
            targets[rng.random(targets.shape) >= np.array(self.observed)] = np.nan
        groups = (item[:, 0] > 0) + 2 * (item[:, 1 % self.rank] > 0)
        features = np.stack([users, items, groups[items]], axis=1)
        return RatingSource(
            self.kind,
            self.fields,
            features,
            targets,
            self.task_names,
            users,
            licence=self.info.licence,
        )
