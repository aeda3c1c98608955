"""Losses on load: Switch form, router z-loss, entropy; and the bias that needs no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Aux, Routing
from coterie.core.share import summed
from coterie.experts.balance.base import (
    BALANCES,
    BalancePart,
    by_sequence,
    mean_rows,
    scored_columns,
    stack,
    term,
)
from coterie.experts.routers import Router, RouterConfig


@BALANCES.register
class NoBalance(BalancePart):
    """No loss."""

    kind: Literal["none"] = "none"


@BALANCES.register
class SwitchBalance(BalancePart):
    """``E * sum_e f_e P_e`` per layer and round (arXiv:2101.03961, eq. 4): 1 when uniform.

    f_e: share of all choices that went to e (so dividing by K is included); no gradient.
    P_e: mean probability of e. ``statistics``: over the batch, or per sequence and then averaged
    (DeepSeekMoE's released form, CoE). ``groups`` > 0: the device form of DeepSeekMoE, mean f and
    summed P over equal consecutive groups. ``per_choice`` False: f_e per row, not divided by the
    mean number of choices (dynamic routing). ``importance`` ``gates``: P from gates (MoDE).
    ``pooled``: one term from the rows of all layers and rounds together (Mixtral, RMoE), or of all
    layers that share a pool of experts (ReXMoE).
    """

    kind: Literal["switch"] = "switch"
    weight: NonNegativeFloat = 0.01
    statistics: Literal["batch", "sequence"] = "batch"
    groups: PositiveInt | None = None
    per_choice: bool = True
    importance: Literal["probs", "gates"] = "probs"
    pooled: bool = False

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        if not routings:
            return ()
        read, name = ([stack(routings)], "switch_pooled") if self.pooled else (routings, "switch")
        values = self.values(read)
        return tuple(term(name, r, value, self.weight) for r, value in zip(routings, values))

    def value(self, routing: Routing) -> Tensor:
        """Scalar, float32."""
        return self.values([routing])[0]

    def values(self, routings: Sequence[Routing]) -> list[Tensor]:
        """That of each; processes that share the batch add up once for all."""
        if self.statistics == "sequence" and routings[0].unit == "token":
            parts = [part for r in routings for part in self._of(*self._sums(r, True))]
            totals = summed(*parts)
            return [t / groups.clamp_min(1) for t, groups in zip(totals[::2], totals[1::2])]
        flat = summed(*(part for r in routings for part in self._sums(r, False)))
        each = [self._of(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        return [total / groups.clamp_min(1) for total, groups in each]

    def _sums(self, routing: Routing, apart: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Over the rows of each sequence, or of all: choices [S, E], shares [S, E], rows [S]."""
        chosen = scored_columns(routing, routing.one_hot())
        share = scored_columns(routing, self._importance(routing))
        keep = routing.rows_mask().float()
        share = torch.where(keep[:, None] > 0, share, torch.zeros_like(share))
        return (
            by_sequence(routing, chosen, apart).sum(dim=1),
            by_sequence(routing, share, apart).sum(dim=1),
            by_sequence(routing, keep, apart).sum(dim=1),
        )

    def _of(self, counts_SE: Tensor, sums_SE: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars: the sum over sequences, and how many have rows."""
        choices_S = counts_SE.sum(dim=1) if self.per_choice else rows_S
        f = counts_SE / choices_S.clamp_min(1.0)[:, None] * counts_SE.shape[1]
        p = sums_SE / rows_S.clamp_min(1.0)[:, None]
        if self.groups is not None:
            f = f.unflatten(1, (self.groups, -1)).mean(dim=2)
            p = p.unflatten(1, (self.groups, -1)).sum(dim=2)
        return (f * p).sum(dim=1).sum(), (rows_S > 0).float().sum()

    def _importance(self, routing: Routing) -> Tensor:
        if self.importance == "probs":
            return routing.probs
        width = routing.num_experts + 1
        full = routing.gates.new_zeros(routing.gates.shape[0], width)
        return full.scatter_add(1, routing.ids, routing.gates)[:, :-1]

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        if self.pooled and self.statistics == "sequence":
            hint = "pooled rows are those of the whole batch"
            raise ConfigError(describe("statistics", self.statistics, "batch", hint))
        if num_experts is not None and num_experts % (self.groups or 1):
            hint = f"groups are equal parts of the {num_experts} experts"
            raise ConfigError(describe("groups", self.groups, f"a divisor of {num_experts}", hint))
        if router.probability == "identity":
            hint = "raw scores are no shares; use contrastive, or softmax"
            raise ConfigError(describe("kind", self.kind, "a softmax or sigmoid router", hint))


@BALANCES.register
class ZLoss(BalancePart):
    """``mean(logsumexp(logits) ** 2)``: keeps logits small (arXiv:2202.08906)."""

    kind: Literal["z_loss"] = "z_loss"
    weight: NonNegativeFloat = 1e-3

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        values = mean_rows(routings, map(self._of, routings))
        return tuple(term("z_loss", r, v, self.weight) for r, v in zip(routings, values))

    def value(self, routing: Routing) -> Tensor:
        return mean_rows([routing], [self._of(routing)])[0]

    def _of(self, routing: Routing) -> Tensor:
        return scored_columns(routing, routing.logits).logsumexp(dim=1).square()


@BALANCES.register
class EntropyLoss(BalancePart):
    """Mean entropy of the probabilities in nats; a positive weight makes rows decisive.

    (Dynamic routing, arXiv:2403.07652.)
    """

    kind: Literal["entropy"] = "entropy"
    weight: float = 1e-4

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        values = mean_rows(routings, map(self._of, routings))
        return tuple(term("entropy", r, v, self.weight) for r, v in zip(routings, values))

    def value(self, routing: Routing) -> Tensor:
        return mean_rows([routing], [self._of(routing)])[0]

    def _of(self, routing: Routing) -> Tensor:
        p = scored_columns(routing, routing.probs)
        # log of 0 has no gradient to give; a closed candidate contributes 0.
        return -(p * p.clamp_min(1e-30).log()).sum(dim=1)

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        if router.probability != "softmax":
            hint = "an entropy is that of a distribution"
            raise ConfigError(describe("kind", self.kind, "a softmax router", hint))


@BALANCES.register
class SelectionBiasUpdate(BalancePart):
    """``bias += rate * sign(mean load - load)`` once per optimiser step (DeepSeek-V3).

    No loss. Counts come from the routings handed over, summed over micro-batches, layers' own
    rounds included; forward never changes the bias, so evaluation never counts.
    """

    kind: Literal["selection_bias"] = "selection_bias"
    rate: PositiveFloat = 1e-3

    def after_step(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """``routers`` in the order of the (layer, round) pairs of the routings; a router that
        serves several rounds is listed once for each."""
        places = sorted({(r.layer, r.round) for r in routings})
        if not places:
            return
        if len(places) != len(routers):
            raise ValueError(f"{len(routers)} routers for {len(places)} (layer, round) pairs")
        loads: dict[int, Tensor] = {}
        owners: dict[int, Router] = {}
        same = [[r for r in routings if (r.layer, r.round) == place] for place in places]
        stacks = [torch.stack([r.counts()[: r.num_scored] for r in these]) for these in same]
        for router, load in zip(routers, summed(*(counts.sum(dim=0) for counts in stacks))):
            owners[id(router)] = router
            loads[id(router)] = loads.get(id(router), torch.zeros_like(load)) + load
        for key, router in owners.items():
            if router.selection_bias is None:
                raise ValueError("a router without selection_bias cannot be updated")
            load = loads[key]
            with torch.no_grad():
                step = self.rate * torch.sign(load.mean() - load)
                router.selection_bias += step.to(router.selection_bias)

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        if not router.selection_bias:
            hint = "there is no bias to update without"
            allowed = "a router with selection_bias=true"
            raise ConfigError(describe("kind", self.kind, allowed, hint))
