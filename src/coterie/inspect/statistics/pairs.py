"""Two routers that score the same rows: which experts of the second follow those of the first.

The pairs are a router and the next one of its slot: the next round of the same layer, or the first
round of the next layer. Shapes: R rows, K choices, E and F experts of the two, 2 halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from coterie.core.routing import Routing
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import (
    Place,
    RouterTrace,
    Rows,
    layer_name,
    several_slots,
)
from coterie.inspect.statistics.formulas import Array, Information

if TYPE_CHECKING:
    from coterie.inspect.statistics.trace import Trace

MAX_PAIR_CELLS = 2**18
"""Pairs of routers with more pairs of experts than this are not counted, and say so."""


def aligned(first: Routing, second: Routing) -> bool:
    """Whether row r of both is the same token (or sample)."""
    return first.unit == second.unit and first.batch == second.batch


def first_choice(ids: Tensor, gates: Tensor, num_experts: int) -> Tensor:
    """i64 [R]: the choice with the largest gate, the earlier one of equals; ``num_experts`` for a
    row without any."""
    open_ = gates.float().masked_fill(ids >= num_experts, float("-inf"))
    return ids.gather(1, open_.argmax(dim=1, keepdim=True))[:, 0]


class PairTrace:
    """Counts of one router against the next, over the rows that both gave an expert.

    ``leads`` [2, E, F]: rows by their two first choices. ``joint`` [2, E, F]: rows that chose e and
    then f. ``overlap / rows`` [2]: mean share of common experts, where both choose among the same
    ones.
    """

    def __init__(self, first: RouterTrace, second: RouterTrace) -> None:
        self.routers = (first, second)
        self.sizes = (first.num_experts, second.num_experts)
        too_many = first.num_experts * second.num_experts > MAX_PAIR_CELLS
        self.reason = f"more than {MAX_PAIR_CELLS:,} pairs of experts" if too_many else ""
        shape = (2, 0, 0) if too_many else (2, *self.sizes)
        self.leads: Array = np.zeros(shape)
        self.joint: Array = np.zeros(shape)
        self.overlap: Array = np.zeros(2)
        self.rows: Array = np.zeros(2)

    @property
    def places(self) -> tuple[Place, Place]:
        return self.routers[0].place, self.routers[1].place

    @property
    def kind(self) -> Literal["round", "layer"]:
        first, second = self.places
        return "round" if first.layer == second.layer else "layer"

    @property
    def same_experts(self) -> bool:
        """Whether both choose among the same experts."""
        first, second = self.routers
        return self.kind == "round" or (
            len(first.pool_layers) > 1 and first.pool_layers == second.pool_layers
        )

    @property
    def main(self) -> int:
        return self.routers[0].main

    def add(self, first: tuple[Routing, Rows], second: tuple[Routing, Rows]) -> None:
        """Each routing with its rows as :meth:`RouterTrace.add` counted them."""
        if self.reason:
            return
        leads = [
            first_choice(rows.ids, routing.gates.detach(), size)
            for (routing, rows), size in zip((first, second), self.sizes)
        ]
        known = (leads[0] < self.sizes[0]) & (leads[1] < self.sizes[1])
        chosen = [_chosen(rows.ids, n) for (_, rows), n in zip((first, second), self.sizes)]
        for half in (0, 1):
            rows = known & (first[1].half == half)
            if not bool(rows.any()):
                continue
            index = leads[0][rows] * self.sizes[1] + leads[1][rows]
            counts = torch.bincount(index, minlength=self.sizes[0] * self.sizes[1])
            self.leads[half] += counts.double().cpu().numpy().reshape(self.sizes)
            a, b = chosen[0][rows], chosen[1][rows]
            self.joint[half] += (a.T @ b).double().cpu().numpy()
            self.rows[half] += float(rows.sum())
            if self.same_experts:
                larger = torch.maximum(a.sum(1), b.sum(1))
                self.overlap[half] += float(((a * b).sum(1) / larger).double().sum())


def _chosen(ids: Tensor, num_experts: int) -> Tensor:
    """f32 [R, E] of 0 and 1."""
    out = torch.zeros(len(ids), num_experts + 1, device=ids.device)
    return out.scatter_(1, ids, 1.0)[:, :num_experts]


@dataclass(frozen=True, eq=False)
class PairStats:
    """Numbers of one pair, over conditional rows where there are any."""

    first: Place
    second: Place
    kind: Literal["round", "layer"]
    names: tuple[str, str]  # of the two layers
    name: str  # "0 to 1", or "0, round 0 to 1"
    rows: float
    information: Information | None  # between the first choices; None: not counted
    overlap: float  # mean share of common experts, NaN where they are not the same ones
    chance: float  # what independent choices with the same loads would share
    lift: Array  # [E, F] joint choices over what the loads explain, NaN where undefined
    reason: str  # why the pair was not counted


def analyse_pairs(trace: Trace) -> list[PairStats]:
    """One record per pair of neighbours, in order of depth; [] for a single router."""
    slots = several_slots(trace.routers)
    return [_pair_stats(pair, slots) for pair in trace.pairs]


def _pair_stats(pair: PairTrace, slots: bool) -> PairStats:
    half, (first, second) = pair.main, pair.places
    joint, rows = pair.joint[half], float(pair.rows[half])
    counted = rows > 0 and not pair.reason
    known = counted and pair.same_experts
    here, after = (layer_name(router, slots) for router in pair.routers)
    name = f"{here} to {layer_name(pair.routers[1], False)}"
    if pair.kind == "round":
        name = f"{here}, round {first.round} to {second.round}"
    return PairStats(
        first=first,
        second=second,
        kind=pair.kind,
        names=(here, after),
        name=name,
        rows=rows,
        information=formulas.information(pair.leads[half]) if counted else None,
        overlap=float(pair.overlap[half] / rows) if known else float("nan"),
        chance=_chance(pair, half) if known else float("nan"),
        lift=formulas.joint_lift(joint),
        reason=pair.reason or ("" if counted else "no row was scored by both"),
    )


def _chance(pair: PairTrace, half: int) -> float:
    """Overlap of two rows that choose independently with the two routers' loads."""
    rates = [router.counts[half] / max(float(router.rows[half]), 1.0) for router in pair.routers]
    larger = max(float(rate.sum()) for rate in rates)
    return float((rates[0] * rates[1]).sum() / larger) if larger else float("nan")
