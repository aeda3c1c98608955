"""What a balance part answers, and how statistics read a Routing.

Every loss reads Routing records and nothing else, so it works for any router, exists whether or
not logits are logged, and stays attached to the graph. Rows with mask False never count.
Legend: R rows, E scored experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from coterie.core.registry import Part, Registry
from coterie.core.routing import Aux, Routing, loads
from coterie.core.share import over_total
from coterie.experts.routers import Router, RouterConfig

BALANCES = Registry("balance", "coterie.balances")


class BalancePart(Part):
    """Base of balance configurations; the configuration is the object (nothing is learnt)."""

    kind: str

    def build(self) -> BalancePart:
        return self

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        """Auxiliary losses of all routings of one slot (all layers and rounds)."""
        return ()

    def after_step(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """Once per optimiser step, with the routings of all its micro-batches."""

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        """Raise ConfigError where this part cannot work with that router and this number of
        candidates (None: not yet known)."""


def scored_columns(routing: Routing, values: Tensor) -> Tensor:
    """[R, num_experts] -> [R, E]."""
    return values[:, : routing.num_scored]


def by_sequence(routing: Routing, values: Tensor, apart: bool) -> Tensor:
    """[R, ...] -> [S, R / S, ...]: one group per sample if ``apart`` (and rows are tokens)."""
    groups = routing.batch[0] if apart and routing.unit == "token" and values.shape[0] else 1
    return values.unflatten(0, (groups, values.shape[0] // groups))


def mean_rows(routings: Sequence[Routing], values: Iterable[Tensor]) -> list[Tensor]:
    """Mean over the batch's rows that count of the values [R] of each routing, 0 where none does;
    a part of it that processes average where they share the batch."""
    made: list[Tensor] = []
    for routing, each, (_, rows) in zip(routings, values, loads(routings)):
        # NaN in a masked row must not spread.
        kept = torch.where(routing.rows_mask(), each, torch.zeros_like(each))
        made.append(over_total(kept.sum(), rows))
    return made


def stack(routings: Sequence[Routing]) -> Routing:
    """The rows of several routings over the same experts, as one."""
    first, most = routings[0], max(r.top_k for r in routings)
    ids = [F.pad(r.ids, (0, most - r.top_k), value=r.num_experts) for r in routings]
    return first.replace(
        ids=torch.cat(ids),
        gates=torch.cat([F.pad(r.gates, (0, most - r.top_k)) for r in routings]),
        probs=torch.cat([r.probs for r in routings]),
        logits=torch.cat([r.logits for r in routings]),
        mask=torch.cat([r.rows_mask() for r in routings]),
        batch=(len(routings) * first.batch[0], first.batch[1]),
        inputs=None,
    )


def term(name: str, routing: Routing, value: Tensor, weight: float) -> Aux:
    """One loss of one layer; later rounds of a layer are named apart, all are added."""
    full = name if routing.round == 0 else f"{name}_round{routing.round}"
    return Aux(full, value, weight, routing.layer)
