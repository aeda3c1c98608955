"""Experts and the routers that use them: one pool may serve several rounds and several layers.

The load of an expert is what all of these give it; judged layer by layer, an expert that no layer
uses much and one that all use would look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import RouterTrace, layer_name, several_slots
from coterie.inspect.statistics.formulas import Array

if TYPE_CHECKING:
    from coterie.inspect.statistics.trace import Trace


@dataclass(frozen=True, eq=False)
class PoolStats:
    """Numbers of one pool of E experts, over conditional rows where there are any.

    ``owners``: layers that own equal parts of it, in its order; one layer where nothing is shared.
    """

    slot: str
    name: str  # "0" or "0 to 3", with the slot where there are several
    owners: tuple[int, ...]
    layers: tuple[int, ...]  # whose routers were seen
    routers: int
    counts: Array  # [E] choices of all these routers
    imbalance: Array  # [E] (load - mean load) / mean load, 0 = even (LBV of ReXMoE)
    shares: Array  # [layers, owners] share of a layer's choices that go to an owner's experts

    @property
    def shared(self) -> bool:
        """Whether several layers use it."""
        return len(self.owners) > 1

    @property
    def own_shares(self) -> dict[int, float]:
        """Layer -> share of its choices that stay with its own experts."""
        return {
            layer: float(self.shares[row, self.owners.index(layer)])
            for row, layer in enumerate(self.layers)
            if layer in self.owners
        }


def analyse_pools(trace: Trace) -> list[PoolStats]:
    """One record per pool, by slot and depth; [] for a dense model."""
    groups: dict[tuple[str, tuple[int, ...]], list[RouterTrace]] = {}
    for router in trace.routers:
        owners = router.pool_layers or (router.place.layer,)
        groups.setdefault((router.place.slot, owners), []).append(router)
    slots = several_slots(trace.routers)
    return [_pool(slots, slot, owners, routers) for (slot, owners), routers in groups.items()]


def _pool(slots: bool, slot: str, owners: tuple[int, ...], routers: list[RouterTrace]) -> PoolStats:
    layers = tuple(sorted({router.place.layer for router in routers}))
    by_layer = np.zeros((len(layers), routers[0].num_experts))
    for router in routers:
        by_layer[layers.index(router.place.layer)] += router.counts[router.main]
    total = by_layer.sum(0)
    last = f" to {owners[-1]}" if len(owners) > 1 else ""
    parts = by_layer.reshape(len(layers), len(owners), -1).sum(2)
    return PoolStats(
        slot=slot,
        name=layer_name(routers[0], slots) + last,
        owners=owners,
        layers=layers,
        routers=len(routers),
        counts=total,
        imbalance=formulas.relative_imbalance(total),
        shares=formulas.load_share(parts),
    )
