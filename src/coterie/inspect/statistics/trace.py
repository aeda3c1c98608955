"""Traces: counts of routings, accumulated batch by batch in bounded memory.

trace = Trace(grid=(4, 4)) trace.add(prediction.routings)                 # any number of batches
trace.add_step(step, prediction.routings)      # along a sampling run, in order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError, describe
from coterie.core.routing import Routing
from coterie.inspect.statistics.accumulators import Place, RouterTrace, Rows
from coterie.inspect.statistics.formulas import Array
from coterie.inspect.statistics.pairs import PairTrace, aligned

NOISE_BINS = 10
MAX_SAMPLING_STEPS = 4096

Last = tuple[int, Tensor, Tensor | None]  # step, chosen bool [R, E], sample ids


@dataclass(eq=False)
class StepTrace:
    """Agreement of one router with itself one sampling step earlier; index = step.

    ``overlap / rows`` [2, S] is the mean of |A n B| / max(|A|, |B|) per half and step (step 0 has
    none); ``counts`` [S, E] are the choices per step over both halves.
    """

    num_experts: int
    overlap: Array = field(default_factory=lambda: np.zeros((2, 0)))
    rows: Array = field(default_factory=lambda: np.zeros((2, 0)))
    counts: Array = field(default_factory=lambda: np.zeros((0, 0)))
    rows_seen: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.counts = np.zeros((0, self.num_experts))

    def grow(self, steps: int) -> None:
        more = steps - self.rows.shape[1]
        if more > 0:
            self.overlap = np.pad(self.overlap, ((0, 0), (0, more)))
            self.rows = np.pad(self.rows, ((0, 0), (0, more)))
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))
            self.rows_seen = np.pad(self.rows_seen, (0, more))

    def mean_overlap(self, half: int | None = None) -> Array:
        """[S] mean overlap with the step before (NaN where unknown); both halves by default."""
        overlap = self.overlap.sum(0) if half is None else self.overlap[half]
        rows = self.rows.sum(0) if half is None else self.rows[half]
        return np.divide(overlap, rows, out=np.full(len(rows), np.nan), where=rows > 0)

    def early_late(self) -> tuple[float, float]:
        """Mean overlap over the first and the second half of the known steps (NaN if < 2)."""
        curve = self.mean_overlap()
        known = curve[np.isfinite(curve)]
        if len(known) < 2:
            return float("nan"), float("nan")
        middle = len(known) // 2
        return float(known[:middle].mean()), float(known[middle:].mean())


class Trace:
    """Counts of chosen experts per router, by noise level, class and position; and of pairs of
    experts in successive routers of a slot (the next round, or the next layer).

    ``noise_to_unit`` maps ``Routing.noise`` to [0, 1] (needed where the process time is a standard
    deviation); ``grid`` = (height, width) of the tokens of an image, or (x, y upwards, z) of a
    volume, in row-major order. Conditional and unconditional rows (label NULL_LABEL) are counted
    separately.
    """

    def __init__(
        self,
        *,
        noise_bins: int = NOISE_BINS,
        noise_to_unit: Callable[[Tensor], Tensor] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        if noise_bins < 1:
            raise DataError(describe("noise_bins", noise_bins, ">= 1"))
        self.noise_bins = noise_bins
        self.noise_to_unit = noise_to_unit
        self.grid = grid
        self.steps: dict[Place, StepTrace] = {}
        self._routers: dict[Place, RouterTrace] = {}
        self._pairs: dict[tuple[Place, Place], PairTrace] = {}
        self._last: dict[Place, Last] = {}

    @property
    def routers(self) -> list[RouterTrace]:
        """All routers, by slot, then layer, then round."""
        return [self._routers[place] for place in sorted(self._routers)]

    @property
    def pairs(self) -> list[PairTrace]:
        """Each router with the next one of its slot, by slot, then layer, then round."""
        return [self._pairs[places] for places in sorted(self._pairs)]

    def __len__(self) -> int:
        return len(self._routers)

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one forward pass; an empty sequence (a dense model) changes nothing."""
        counted: dict[Place, tuple[Routing, Rows]] = {}
        for routing in routings:
            place = Place(routing.slot, routing.layer, routing.round)
            if place not in self._routers:
                self._routers[place] = RouterTrace(routing, self.noise_bins)
            rows = self._routers[place].add(routing, self._unit_noise(routing))
            counted[place] = (routing, rows)
        if len(counted) == len(routings):  # else rows of several passes would be mixed up
            self._add_pairs(counted)

    def _add_pairs(self, counted: Mapping[Place, tuple[Routing, Rows]]) -> None:
        for first, second in pairwise(sorted(counted)):
            here, after = counted[first], counted[second]
            if first.slot != second.slot or not aligned(here[0], after[0]):
                continue
            if (first, second) not in self._pairs:
                routers = self._routers[first], self._routers[second]
                self._pairs[first, second] = PairTrace(*routers)
            self._pairs[first, second].add(here, after)

    @torch.no_grad()
    def add_step(self, step: int, routings: Sequence[Routing]) -> None:
        """Compare the choices of sampling step ``step`` (0 = the noisiest) with those of the step
        before.

        Call it for every step once, in order, with the same samples in the same rows. A second call
        for a step (later stages of a solver) is ignored; a lower step, other samples, another shape
        or a gap starts a new run, without a comparison.
        """
        if not 0 <= step < MAX_SAMPLING_STEPS:
            raise DataError(describe("step", step, f"0..{MAX_SAMPLING_STEPS - 1}"))
        for routing in routings:
            place = Place(routing.slot, routing.layer, routing.round)
            last = self._last.get(place)
            if last is not None and last[0] == step and _same(last[2], routing.sample_ids):
                continue
            experts = routing.num_scored
            trace = self.steps.setdefault(place, StepTrace(experts))
            chosen = routing.one_hot()[:, :experts].bool()
            if chosen.shape[1] != trace.num_experts:
                raise DataError(
                    describe("num_experts", chosen.shape[1], f"{trace.num_experts}, as before")
                )
            trace.grow(step + 1)
            trace.counts[step] += chosen.sum(0).double().cpu().numpy()
            trace.rows_seen[step] += float(routing.rows_mask().sum())
            if last is not None and _follows(last, step, chosen, routing.sample_ids):
                _compare(trace, step, last[1], chosen, routing)
            self._last[place] = (step, chosen, routing.sample_ids)

    def _unit_noise(self, routing: Routing) -> Tensor | None:
        if routing.noise is None:
            return None
        noise = routing.noise.detach().float().to(routing.ids.device)
        if self.noise_to_unit is not None:
            noise = self.noise_to_unit(noise)
        ok = torch.isfinite(noise).all() and (noise > -1e-4).all() and (noise < 1 + 1e-4).all()
        if not ok:
            bad = noise[~((noise > -1e-4) & (noise < 1 + 1e-4))][0]
            raise DataError(
                describe("noise", float(bad), "0..1", "pass noise_to_unit for other time axes")
            )
        return noise


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return True
    return first.shape == second.shape and bool((first == second).all())


def _follows(last: Last, step: int, chosen: Tensor, samples: Tensor | None) -> bool:
    if last[0] != step - 1 or last[1].shape != chosen.shape:
        return False
    return _same(last[2], samples)


def _compare(trace: StepTrace, step: int, before: Tensor, now: Tensor, routing: Routing) -> None:
    shared = (before & now).sum(1).double()
    larger = torch.maximum(before.sum(1), now.sum(1)).double()
    known = larger > 0
    half = torch.zeros(routing.batch[0], dtype=torch.long, device=now.device)
    if routing.label is not None:
        half = (routing.label.to(now.device) == NULL_LABEL).long()
    if routing.unit == "token":
        half = half.repeat_interleave(routing.batch[1])
    share = shared / larger.clamp(min=1)
    for index in (0, 1):
        rows = known & (half == index)
        trace.overlap[index, step] += float(share[rows].sum())
        trace.rows[index, step] += float(rows.sum())
