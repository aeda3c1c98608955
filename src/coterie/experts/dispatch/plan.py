"""A dispatch plan: the order in which experts read rows. No parameters, no arithmetic on x.

Legend: R rows (tokens, or whole samples), K choices, A assignments (used choices), E tensors in the
pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.routing import Routing, Unit


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """The choices of R rows, also sorted by expert (computed when first used)."""

    unit: Unit
    ids: Tensor  # i64 [R, K], tensor index; num_experts = nobody
    gates: Tensor  # f32 [R, K]
    num_experts: int

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]

    @property
    def sparse(self) -> bool:
        """Whether a row has fewer choices than there are experts, as far as the shapes tell."""
        return self.num_experts > 1 and self.ids.shape[1] < self.num_experts

    @cached_property
    def counts(self) -> list[int]:
        """Assignments per expert."""
        counted = torch.bincount(self.ids.flatten(), minlength=self.num_experts + 1)
        result: list[int] = counted[: self.num_experts].tolist()
        return result

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """``by_expert`` of all choices."""
        return by_expert(self.ids, self.num_experts)

    @cached_property
    def order(self) -> Tensor:
        """i64 [A]: positions in the flattened [R*K] choices, by expert, rows ascending."""
        return self.segments[0][: sum(self.counts)]

    @cached_property
    def rows(self) -> Tensor:
        """i64 [A]: the row of each sorted assignment."""
        return torch.div(self.order, self.ids.shape[1], rounding_mode="floor")

    @cached_property
    def sorted_gates(self) -> Tensor:
        """f32 [A]."""
        return self.gates.flatten().index_select(0, self.order)

    @cached_property
    def sorted_ids(self) -> Tensor:
        """i64 [A], ascending."""
        return self.ids.flatten().index_select(0, self.order)

    @cached_property
    def offsets(self) -> Tensor:
        """i32 [E]: where each expert's segment ends."""
        return self.segments[1][1:]

    def per_token(self, tokens: int) -> DispatchPlan:
        """The choices of samples as choices of each of their tokens."""
        ids, gates = (value.repeat_interleave(tokens, 0) for value in (self.ids, self.gates))
        return DispatchPlan("token", ids, gates, self.num_experts)

    def dense_gates(self) -> Tensor:
        """f32 [R, E]: gate of each row for each expert, 0 where not chosen."""
        full = self.gates.new_zeros(self.num_rows, self.num_experts + 1)
        return full.scatter_add(1, self.ids, self.gates)[:, : self.num_experts]


def by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices ids i64 [R, K] sorted by expert, without waiting for a GPU.

    Positions i64 [R*K] in the flattened choices, by expert, rows ascending, unused choices last;
    and i32 [E + 1]: start of each expert's segment, and the end of the last one.
    """
    flat = ids.flatten()
    # A radix sort passes over every byte of its keys.
    keys = flat.short() if flat.is_cuda and num_experts < 2**15 else flat
    order = keys.argsort(stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device)
    return order, torch.searchsorted(flat[order], experts, out_int32=True)


def plan(
    routing: Routing, slot_map: Sequence[int] | None = None, num_experts: int | None = None
) -> DispatchPlan:
    """Plan one routing over a pool of ``num_experts`` tensors (default: the routing's own)."""
    tensors = routing.num_experts if num_experts is None else num_experts
    return plan_choices(routing.ids, routing.gates, tensors, slot_map, routing.unit)


def plan_choices(
    ids: Tensor,
    gates: Tensor,
    num_experts: int,
    slot_map: Sequence[int] | None = None,
    unit: Unit = "token",
) -> DispatchPlan:
    """Plan choices ids i64 [R, K] with gates [R, K] over ``num_experts`` tensors.

    ``slot_map[c]`` is the tensor of candidate c; several candidates may share one. A row that
    chose the same tensor twice computes it once with the gates added.
    """
    if slot_map is not None:
        table = torch.tensor([*slot_map, num_experts], dtype=torch.int64, device=ids.device)
        ids, gates = _merge(table[ids], gates, num_experts)
    return DispatchPlan(unit, ids, gates, num_experts)


def _merge(ids: Tensor, gates: Tensor, nobody: int) -> tuple[Tensor, Tensor]:
    """Move the gate of a repeated choice to its first place in the row."""
    first = (ids[:, :, None] == ids[:, None, :]).int().argmax(dim=2)
    merged = torch.zeros_like(gates).scatter_add(1, first, gates)
    repeated = first != torch.arange(ids.shape[1], device=ids.device)
    return ids.masked_fill(repeated, nobody), merged


def scale_rows(values: Tensor, gates: Tensor, float32: bool) -> Tensor:
    """values [A, ..., D] times gates [A]; in float32 with ``float32``, else in the values' type."""
    wide = torch.promote_types(values.dtype, torch.float32) if float32 else values.dtype
    return values.to(wide) * gates.to(wide).reshape(-1, *[1] * (values.dim() - 1))


def one_hot_rows(ids: Tensor, num_experts: int) -> Tensor:
    """bool [R, E]: which experts each row chose."""
    return F.one_hot(ids, num_experts + 1).any(dim=1)[:, :num_experts]
