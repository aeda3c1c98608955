"""Our experts in the place of theirs: any pool behind the call ``experts(h, ids, weights)``.

Legend: T tokens, K choices, E candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.experts import ExpertPool, dispatch
from coterie.experts.dispatch import plan_choices


class PoolExperts(nn.Module):
    """``forward(h [T, D], ids i64 [T, K], weights [T, K]) -> [T, D]`` by our dispatch.

    ``slot_map``: candidate -> tensor of the pool, many to one (merged experts). The router keeps
    its E rows; an id of E stands for nobody.
    """

    def __init__(
        self, pool: ExpertPool, num_experts: int, slot_map: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if slot_map is None and pool.num_experts != num_experts:
            hint = "or a slot_map that says which tensor serves each candidate"
            raise ConfigError(
                describe("pool.num_experts", pool.num_experts, f"{num_experts}", hint)
            )
        if slot_map is not None and len(slot_map) != num_experts:
            allowed = f"{num_experts} entries, one per candidate"
            raise ConfigError(describe("slot_map", len(slot_map), allowed))
        if slot_map is not None and not all(0 <= slot < pool.num_experts for slot in slot_map):
            allowed = f"each in 0..{pool.num_experts - 1}"
            raise ConfigError(describe("slot_map", tuple(slot_map), allowed))
        self.pool = pool
        self.num_experts = num_experts
        self.slot_map = None if slot_map is None else tuple(slot_map)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        made = plan_choices(top_k_index, top_k_weights, self.pool.num_experts, self.slot_map)
        return dispatch(hidden_states, made, self.pool, float32=True)

    def tensor_of(self, expert: int) -> int:
        """Which tensor of the pool serves a candidate."""
        return expert if self.slot_map is None else self.slot_map[expert]
