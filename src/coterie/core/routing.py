"""The decision of a router as a record: which experts each row uses, and with what gate.

Balance losses, dispatch, caches, merging, traces and reports read this record and nothing else, so
each is written once and works for every router. A forward pass returns its routings; they are not
kept in a global list.
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
    weight: float  # factor of ``value`` in the training loss
    layer: int | None = None  # number of the layer; None: one term for the whole model

    @property
    def key(self) -> str:
        """Name of the loss in the log."""
        return self.name if self.layer is None else f"{self.name}/layer{self.layer}"


@dataclass(frozen=True, eq=False)
class Routing:
    """R rows routed over E experts with at most K choices each.

    A row is a token (``unit`` "token", R = B*N, sample by sample) or a sample ("sample", R = B).
    Where the number of experts varies by row, unused choices have the id ``num_experts`` and gate
    0.
    """

    unit: Unit
    num_experts: int  # E, with the reserved ones
    ids: Tensor  # i64 [R, K], best first where the selection is sorted
    gates: Tensor  # f32 [R, K]; carries the gradient to the router
    probs: Tensor  # f32 [R, E], the router's probabilities
    logits: Tensor  # f32 [R, E], before softmax or sigmoid
    batch: tuple[int, int]  # (B, N)
    mask: Tensor | None = None  # bool [R], False = the row counts in no loss or statistic
    slot: str = "ffn"  # kind of slot: ffn, pre_block, conv
    layer: int = 0  # number of the block, or of the replaced module
    name: str = ""  # of the module that the slot replaces, in networks of other libraries
    expert_names: tuple[str, ...] = ()  # names of the experts; () = they are numbered
    round: int = 0  # pass through the layer's experts, 0..rounds-1
    noise: Tensor | None = None  # f32 [B], process time of each sample
    step_index: Tensor | None = None  # i64 [B]
    label: Tensor | None = None  # i64 [B], after dropout
    task: Tensor | None = None  # i64 [B] or [B, N], task of each sample or token
    sample_ids: Tensor | None = None  # i64 [B]
    inputs: Tensor | None = None  # [R, D], what the router scored (contrastive losses)
    prototypes: Tensor | None = None
    """[E', D], one per expert, of routers that compare rows with prototypes"""
    table: Tensor | None = None  # f32 [S, E], probs at every step, for noise-level routers
    state: Tensor | None = None  # router state for the next layer
    pool_layers: tuple[int, ...] = ()  # owners of the E experts, in equal parts; () = own layer
    grid: tuple[int, ...] = ()  # shape of the N rows of a sample, row-major; () = unknown
    owner: object = None  # the network whose layer routed, by identity; None = unknown
    num_reserved: int = 0  # experts at the end of the E that are never scored (ProMoE's partition)

    @property
    def num_scored(self) -> int:
        """Number of experts that the router chooses among: all but the reserved ones."""
        return self.num_experts - self.num_reserved

    @property
    def top_k(self) -> int:
        """K, the most experts that a row uses."""
        return self.ids.shape[1]

    @property
    def valid(self) -> Tensor:
        """bool [R, K]: choices that stand for an expert, in rows that ``mask`` keeps."""
        chosen = self.ids < self.num_experts
        return chosen if self.mask is None else chosen & self.mask[:, None]

    def counts(self) -> Tensor:
        """f32 [E]: how many choices each expert received, masked rows left out."""
        return self.one_hot().sum(0)

    def one_hot(self) -> Tensor:
        """f32 [R, E]: choices per row (0 for masked rows and sentinels)."""
        rows = torch.zeros(
            self.ids.shape[0], self.num_experts + 1, dtype=torch.float32, device=self.ids.device
        )
        rows.scatter_add_(1, self.ids, self.valid.float())
        return rows[:, : self.num_experts]

    def rows_mask(self) -> Tensor:
        """bool [R]: ``mask``, or all True where there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replaced(self, changes)

    def detach(self) -> Self:
        """A copy without autograd graph and without the (large) router inputs."""
        changes: dict[str, Any] = {"inputs": None}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and item.name != "inputs":
                changes[item.name] = value.detach()
        return self.replace(**changes)


def loads(routings: Sequence[Routing]) -> list[tuple[Tensor, Tensor]]:
    """For each routing, over the whole batch: choices per expert, f32 [E], and the number of rows
    that count, f32 []."""
    own = [value for r in routings for value in (r.counts(), r.rows_mask().float().sum())]
    totals = summed(*own)
    return list(zip(totals[::2], totals[1::2]))
