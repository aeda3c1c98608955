"""Base class of balance losses, and sums over the rows of a Routing.

Every loss reads Routing records only, so it works for any router. Rows with mask False are left
out. Legend: R rows, E scored experts, K choices.
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
    """Base of balance losses. They have no parameters, so ``build`` returns the configuration."""

    kind: str

    def build(self) -> BalancePart:
        return self

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        """Losses of all routings of one slot (all layers and rounds)."""
        return ()

    def after_step(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """Update routers once per optimiser step, given the routings of all its micro-batches."""

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        """ConfigError if this loss does not work with that router and number of experts (None:
        unknown)."""


def scored_columns(routing: Routing, values: Tensor) -> Tensor:
    """[R, num_experts] -> [R, E]."""
    return values[:, : routing.num_scored]


def by_sequence(routing: Routing, values: Tensor, apart: bool) -> Tensor:
    """[R, ...] -> [S, R / S, ...]: one group per sample if ``apart`` (and rows are tokens)."""
    groups = routing.batch[0] if apart and routing.unit == "token" and values.shape[0] else 1
    return values.unflatten(0, (groups, values.shape[0] // groups))


def mean_rows(routings: Sequence[Routing], values: Iterable[Tensor]) -> list[Tensor]:
    """For each routing, the mean of values [R] over the unmasked rows of the whole batch; 0 if
    none."""
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
    """The loss of one layer; later rounds of a layer have names of their own."""
    full = name if routing.round == 0 else f"{name}_round{routing.round}"
    return Aux(full, value, weight, routing.layer)
