"""The answer of any router at any granularity, as data.

Balance losses, dispatch, caches, merging, traces and reports read this record and nothing else,
so each is written once and works for every router. It is an explicit output of a forward pass:
never a global list, never a side effect of a logging flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from coterie.core.records import replaced
from coterie.core.share import summed

Unit = Literal["token", "sample"]

ENSEMBLE = "ensemble"
"""Slot of the routings that say which of several denoisers answered."""


@dataclass(frozen=True, eq=False)
class Aux:
    """One auxiliary loss. ``value`` is scale-free; training adds ``weight * value``."""

    name: str
    value: Tensor
    weight: float
    layer: int | None = None  # None: one term for the whole model

    @property
    def key(self) -> str:
        return self.name if self.layer is None else f"{self.name}/layer{self.layer}"


@dataclass(frozen=True, eq=False)
class Routing:
    """R rows routed over E experts with at most K choices each.

    R = B*N for unit "token" (sample-major), R = B for unit "sample". A choice equal to
    ``num_experts`` is the sentinel "nobody" (variable k): its gate is 0.
    """

    unit: Unit
    num_experts: int
    ids: Tensor  # i64 [R, K], best first where the selection is sorted
    gates: Tensor  # f32 [R, K]; carries the gradient to the router
    probs: Tensor  # f32 [R, E]
    logits: Tensor  # f32 [R, E], raw: softmax happens once, in the router
    batch: tuple[int, int]  # (B, N)
    mask: Tensor | None = None  # bool [R], False = row not scored by this router
    slot: str = "ffn"
    layer: int = 0
    name: str = ""  # of the place, where a number says little
    expert_names: tuple[str, ...] = ()  # of the experts, where they have some; () = numbers
    round: int = 0
    noise: Tensor | None = None  # f32 [B]
    step_index: Tensor | None = None  # i64 [B]
    label: Tensor | None = None  # i64 [B], after dropout
    task: Tensor | None = None  # i64 [B] or [B, N], what routers keyed by task were told
    sample_ids: Tensor | None = None  # i64 [B]
    inputs: Tensor | None = None  # [R, D], what the router scored (contrastive losses)
    prototypes: Tensor | None = None  # [E', D], for prototype routers
    table: Tensor | None = None  # f32 [S, E], probs at every step, for noise-level routers
    state: Tensor | None = None  # router state for the next layer
    pool_layers: tuple[int, ...] = ()  # owners of the E experts, in equal parts; () = own layer
    grid: tuple[int, ...] = ()  # how the N rows of a sample lie, row-major; () = unsaid
    owner: object = None  # the host whose layer made it, by identity; None = unsaid
    num_reserved: int = 0  # experts at the end of the E that are never scored (ProMoE's partition)

    @property
    def num_scored(self) -> int:
        """Experts the router chooses among."""
        return self.num_experts - self.num_reserved

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def valid(self) -> Tensor:
        """bool [R, K]: a real choice (not the sentinel) of a row that counts."""
        chosen = self.ids < self.num_experts
        return chosen if self.mask is None else chosen & self.mask[:, None]

    def counts(self) -> Tensor:
        """f32 [E]: how many choices each expert received from rows that count."""
        return self.one_hot().sum(0)

    def one_hot(self) -> Tensor:
        """f32 [R, E]: choices per row (0 for masked rows and sentinels)."""
        rows = torch.zeros(
            self.ids.shape[0], self.num_experts + 1, dtype=torch.float32, device=self.ids.device
        )
        rows.scatter_add_(1, self.ids, self.valid.float())
        return rows[:, : self.num_experts]

    def rows_mask(self) -> Tensor:
        """bool [R]: rows that count."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)

    def replace(self, **changes: Any) -> Self:
        return replaced(self, changes)

    def detach(self) -> Self:
        """The record without its graph and without the (large) router inputs."""
        changes: dict[str, Any] = {"inputs": None}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and item.name != "inputs":
                changes[item.name] = value.detach()
        return self.replace(**changes)


def loads(routings: Sequence[Routing]) -> list[tuple[Tensor, Tensor]]:
    """Of the whole batch, for each routing: choices f32 [E], and rows that count, f32 []."""
    own = [value for r in routings for value in (r.counts(), r.rows_mask().float().sum())]
    totals = summed(*own)
    return list(zip(totals[::2], totals[1::2]))
