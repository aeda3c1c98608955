"""Accumulators for one router: counts by column and tables of pairs; rows are not kept.

Shapes: R rows (tokens or samples), K choices, E experts, B samples, N tokens per sample, C columns,
2 halves (conditional, unconditional: label NULL_LABEL).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError, describe
from coterie.core.routing import Routing
from coterie.experts.routers.base import per_row
from coterie.inspect.statistics.formulas import Array

HALVES = ("conditional", "unconditional")
MAX_COLUMNS = 4096
MAX_TABLE_STEPS = 250


class Place(NamedTuple):
    """The place of a router."""

    slot: str
    layer: int
    round: int


class Rows(NamedTuple):
    """The rows of one routing that count, ready for counting."""

    ids: Tensor  # i64 [R, K], E = nobody
    half: Tensor  # i64 [R], 0 conditional, 1 unconditional
    keep: Tensor  # bool [R]
    sample: Tensor  # i64 [R], index in the batch
    gates: Tensor  # f32 [R, E], 0 where not chosen
    open: Tensor  # bool [R, E], candidates of the row


def joint_counts(ids: Tensor, column: Tensor, columns: int, num_experts: int) -> Array:
    """[columns, E] choices per column and expert; ids equal to E are not counted."""
    index = column[:, None] * (num_experts + 1) + ids
    counts = torch.bincount(index.flatten(), minlength=columns * (num_experts + 1))
    table = counts.reshape(columns, num_experts + 1)[:, :num_experts]
    return table.cpu().numpy().astype(np.float64)


def mass(values: Tensor, column: Tensor, columns: int) -> Array:
    """[columns, E] sum of the rows of ``values`` [R, E] per column."""
    out = torch.zeros(columns, values.shape[1], dtype=torch.float64, device=values.device)
    return out.index_add_(0, column, values.double()).cpu().numpy()


def _bincount(column: Tensor, columns: int) -> Array:
    return torch.bincount(column, minlength=columns).cpu().numpy().astype(np.float64)


class Joint:
    """Choices by (half, column, expert) and rows by (half, column); columns grow on demand.

    ``gates``: sums of absolute gates; ``open``: whether the expert ever had a probability other
    than 0 there. ``reason``: why the table is empty; "" once it is not.
    """

    def __init__(self, num_experts: int, columns: int, reason: str) -> None:
        self.num_experts = num_experts
        self.counts: Array = np.zeros((2, columns, num_experts))
        self.gates: Array = np.zeros((2, columns, num_experts))
        self.open = np.zeros((2, columns, num_experts), dtype=bool)
        self.rows: Array = np.zeros((2, columns))
        self.reason = reason
        self._refused = False

    @property
    def columns(self) -> int:
        return self.rows.shape[1]

    @property
    def varies(self) -> bool:
        """Whether rows of several columns were seen."""
        return int(np.count_nonzero(self.rows.sum(0))) > 1

    def grow(self, columns: int) -> None:
        more = columns - self.columns
        if more > 0:
            wider = ((0, 0), (0, more), (0, 0))
            self.counts, self.gates = np.pad(self.counts, wider), np.pad(self.gates, wider)
            self.open = np.pad(self.open, wider)
            self.rows = np.pad(self.rows, ((0, 0), (0, more)))

    def refuse(self, reason: str) -> None:
        """Drop the table for good (too many columns)."""
        self._refused = True
        self.reason = reason
        self.counts, self.rows = np.zeros((2, 0, self.num_experts)), np.zeros((2, 0))
        self.gates, self.open = self.counts.copy(), self.counts.astype(bool)

    def add(self, rows: Rows, column: Tensor, columns: int) -> None:
        """``column`` i64 [R] in 0..columns-1, for kept rows."""
        if self._refused:
            return
        if columns > MAX_COLUMNS:
            self.refuse(f"more than {MAX_COLUMNS} columns")
            return
        self.grow(columns)
        size = self.columns
        index = rows.half * size + column
        shape = (2, size, self.num_experts)
        counts = joint_counts(rows.ids, index, 2 * size, self.num_experts)
        self.counts += counts.reshape(shape)
        here = index[rows.keep]
        self.gates += mass(rows.gates[rows.keep].abs(), here, 2 * size).reshape(shape)
        self.open |= mass(rows.open[rows.keep].float(), here, 2 * size).reshape(shape) > 0
        self.rows += _bincount(here, 2 * size).reshape(2, size)
        if self.rows.any():
            self.reason = ""


def check_routing(routing: Routing, known: int, unit: str) -> None:
    """Refuse a record that contradicts itself or its router's ``known`` experts and ``unit``."""
    where = f"routing of {routing.slot} layer {routing.layer}"
    if (routing.num_experts, routing.unit) != (known, unit):
        raise DataError(
            f"{where}: {routing.num_experts} experts per {routing.unit}, but it had "
            f"{known} per {unit} before; one trace describes one model"
        )
    batch, tokens = routing.batch
    expected = batch * tokens if routing.unit == "token" else batch
    shapes = (routing.ids.shape[0], tuple(routing.gates.shape), tuple(routing.probs.shape))
    wanted = (expected, tuple(routing.ids.shape), (expected, known))
    if shapes != wanted:
        raise DataError(describe(f"{where}: (rows, gates, probs) shapes", shapes, str(wanted)))
    ids = routing.ids
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= known:
        raise DataError(
            describe(
                f"{where}: ids",
                (int(ids.min()), int(ids.max())),
                f"0..{known} ({known} = nobody)",
            )
        )


class RouterTrace:
    """Everything kept about one router. Arrays start with the half where they have one."""

    def __init__(self, routing: Routing, noise_bins: int) -> None:
        # Experts that a rule, not this router, sends unconditional rows to come last.
        self.reserved = routing.num_reserved
        experts = routing.num_experts - self.reserved
        self.place = Place(routing.slot, routing.layer, routing.round)
        self.label = routing.name
        self.expert_names = routing.expert_names[:experts]
        self.pool_layers = routing.pool_layers
        self.unit = routing.unit
        self.grid = routing.grid
        self.num_experts = experts
        self.top_k = routing.top_k
        self.noise_bins = noise_bins
        self.has_labels = False
        self.rows_seen: Array = np.zeros(2)  # before the router's own mask
        self.rows_bad = 0  # non-finite router output, counted nowhere else
        self.samples: Array = np.zeros(2)
        self.gate_mass: Array = np.zeros((2, noise_bins, experts))
        self.prob_mass: Array = np.zeros((2, noise_bins, experts))
        self.entropy: Array = np.zeros((2, noise_bins))  # nats, summed over rows
        self.entropy_rows: Array = np.zeros((2, noise_bins))
        self.total = Joint(experts, 1, "no rows")
        self.noise = Joint(experts, noise_bins, "no noise level was recorded")
        self.classes = Joint(experts, 0, "no class labels were recorded")
        self.tasks = Joint(experts, 0, "no tasks were recorded")
        self.positions = Joint(experts, 0, "no tokens were recorded")
        if routing.unit == "sample":
            self.positions.reason = "one choice per sample holds at every position"
        self.pairs: Array = np.zeros((2, experts, experts))
        self.choices: Array = np.zeros((2, routing.top_k + 1))
        self.clumping: Array = np.zeros(2)  # see stats.effective_draws
        self.clumps: Array = np.zeros(2)  # samples with a choice
        self.table: Array | None = None  # [S, E] of the newest routing, thinned
        self.prototypes: Array | None = None  # [E', D] of the newest routing

    @property
    def main(self) -> int:
        """The half that statistics describe: conditional rows unless there are none."""
        return 0 if self.total.rows[0].any() or not self.total.rows[1].any() else 1

    @property
    def soft(self) -> bool:
        """Whether every row uses every expert, so that only weights differ."""
        every = self.num_experts * float(self.rows.sum())
        return self.num_experts > 1 and every > 0 and float(self.counts.sum()) == every

    def shares(self, table: Joint) -> Array:
        """[2, C, E] for plots: choices, or weights if the router is soft."""
        return table.gates if self.soft else table.counts

    @property
    def counts(self) -> Array:
        """[2, E] choices per half."""
        return self.total.counts[:, 0]

    @property
    def rows(self) -> Array:
        """[2] rows that count per half."""
        return self.total.rows[:, 0]

    def add(self, routing: Routing, unit_noise: Tensor | None) -> Rows:
        """``unit_noise`` f32 [B] in [0, 1] or None. Returns the rows as they were counted."""
        check_routing(routing, self.num_experts + self.reserved, self.unit)
        rows = self._rows(routing)
        zero = torch.zeros_like(rows.half)
        self.total.add(rows, zero, 1)
        bins = zero
        if unit_noise is not None:
            sample_bin = (unit_noise * self.noise_bins).long().clamp(0, self.noise_bins - 1)
            bins = sample_bin[rows.sample]
            self.noise.add(rows, bins, self.noise_bins)
        if routing.unit == "token":
            tokens = routing.batch[1]
            position = torch.arange(len(rows.half), device=bins.device) % max(tokens, 1)
            self.positions.add(rows, position, tokens)
        self._add_classes(routing, rows)
        self._add_tasks(routing, rows)
        self._add_masses(routing, rows, bins)
        self._add_choices(rows, routing.batch[0])
        self._keep_parameters(routing)
        return rows

    def _rows(self, routing: Routing) -> Rows:
        device = routing.ids.device
        sample = torch.arange(routing.batch[0], device=device)
        half = torch.zeros_like(sample)
        if routing.label is not None:
            half = (routing.label.to(device) == NULL_LABEL).long()
            self.has_labels = True
        if routing.unit == "token":
            sample = sample.repeat_interleave(routing.batch[1])
        finite = torch.isfinite(routing.probs).all(1) & torch.isfinite(routing.gates).all(1)
        mask = routing.rows_mask()
        keep = mask & finite
        self.rows_bad += int((mask & ~finite).sum())
        self.samples += _bincount(half, 2)
        self.rows_seen += _bincount(half[sample], 2)
        ids = torch.where(keep[:, None], routing.ids, self.num_experts).clamp(max=self.num_experts)
        gates = torch.zeros(len(ids), self.num_experts + 1, device=device)
        gates.scatter_add_(1, ids, routing.gates.detach().float().nan_to_num())
        return Rows(
            ids=ids,
            half=half[sample],
            keep=keep,
            sample=sample,
            gates=gates[:, : self.num_experts],
            open=routing.probs.detach()[:, : self.num_experts] != 0,
        )

    def _add_classes(self, routing: Routing, rows: Rows) -> None:
        """Unconditional rows sit in half 1, column 0."""
        if routing.label is None:
            return
        label = routing.label.to(rows.half.device)
        if label.numel() and int(label.min()) < NULL_LABEL:
            raise DataError(describe("label", int(label.min()), f">= {NULL_LABEL} (= no label)"))
        columns = max(1, int(label.max()) + 1) if label.numel() else 1
        self.classes.add(rows, label.clamp(min=0)[rows.sample], max(columns, self.classes.columns))

    def _add_tasks(self, routing: Routing, rows: Rows) -> None:
        if routing.task is None or not len(rows.half):
            return
        task = per_row(routing.task.to(rows.half.device), routing.batch, len(rows.half))
        if int(task.min()) < 0:
            raise DataError(describe("task", int(task.min()), ">= 0"))
        self.tasks.add(rows, task, max(int(task.max()) + 1, self.tasks.columns))

    def _add_masses(self, routing: Routing, rows: Rows, bins: Tensor) -> None:
        size = 2 * self.noise_bins
        column = (rows.half * self.noise_bins + bins)[rows.keep]
        shape = (2, self.noise_bins, self.num_experts)
        probs = routing.probs.detach()[rows.keep, : self.num_experts]
        self.prob_mass += mass(probs, column, size).reshape(shape)
        gate_mass = mass(rows.gates[rows.keep], column, size)
        self.gate_mass += gate_mass.reshape(shape)
        # Scores need not be a distribution (sigmoid, cosine): their positive part is normalised.
        positive = probs.float().clamp(min=0)
        share = positive / positive.sum(1, keepdim=True).clamp(min=1e-30)
        nats = torch.special.entr(share).sum(1, keepdim=True)
        self.entropy += mass(nats, column, size).reshape(2, self.noise_bins)
        self.entropy_rows += _bincount(column, size).reshape(2, self.noise_bins)

    def _add_choices(self, rows: Rows, batch: int) -> None:
        """Choices per row, pairs within a row, and agreement within a sample."""
        width = max(self.choices.shape[1], rows.ids.shape[1] + 1)
        self.choices = np.pad(self.choices, ((0, 0), (0, width - self.choices.shape[1])))
        self.top_k = width - 1
        number = (rows.ids < self.num_experts).sum(1)
        index = (rows.half * width + number)[rows.keep]
        self.choices += _bincount(index, 2 * width).reshape(2, width)
        chosen = torch.zeros(len(rows.half), self.num_experts + 1, device=rows.ids.device)
        chosen = chosen.scatter_(1, rows.ids, 1.0)[:, : self.num_experts]
        for half in (0, 1):
            part = chosen[rows.half == half]
            if len(part):
                self.pairs[half] += (part.T @ part).double().cpu().numpy()
        if len(chosen):
            by_sample = chosen.reshape(batch, -1, self.num_experts).sum(1)
            total = by_sample.sum(1)
            clump = (by_sample**2).sum(1) / total.clamp(min=1)
            sample_half = rows.half.reshape(batch, -1)[:, 0]
            self.clumping += mass(clump[:, None], sample_half, 2)[:, 0]
            self.clumps += mass((total > 0).float()[:, None], sample_half, 2)[:, 0]

    def _keep_parameters(self, routing: Routing) -> None:
        if routing.table is not None:
            table = routing.table.detach()
            steps = torch.linspace(0, len(table) - 1, min(len(table), MAX_TABLE_STEPS)).round()
            self.table = (
                table[steps.long().to(table.device), : self.num_experts].double().cpu().numpy()
            )
        if routing.prototypes is not None:
            self.prototypes = routing.prototypes.detach().double().cpu().numpy()


def several_slots(routers: Sequence[RouterTrace]) -> bool:
    return len({router.place.slot for router in routers}) > 1


def layer_name(router: RouterTrace, slots: bool) -> str:
    """Where a router sits, without its round; with the slot where there are several."""
    return (f"{router.place.slot} " if slots else "") + (router.label or str(router.place.layer))
