"""Losses on expert load (Switch form, router z-loss, entropy), and the loss-free bias update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Aux, Routing, loads
from coterie.core.share import over_total, summed
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
    """No balance loss."""

    kind: Literal["none"] = "none"


@BALANCES.register
class SwitchBalance(BalancePart):
    """``E * sum_e f_e P_e`` per layer and round (arXiv:2101.03961, eq. 4): 1 when uniform.

    f_e is the share of all choices that went to e, without gradient. P_e is the mean probability of
    e.
    """

    kind: Literal["switch"] = "switch"
    weight: NonNegativeFloat = 0.01  # factor in the training loss
    statistics: Literal["batch", "sequence"] = "batch"
    """Over the batch, or per sequence and then averaged (DeepSeekMoE's released code, CoE)."""
    groups: PositiveInt | None = None
    """Number of equal groups of consecutive experts, for DeepSeekMoE's device loss: mean f and
    summed P of each group. null: single experts."""
    per_choice: bool = True
    """False: f_e per row, not divided by the mean number of choices (dynamic routing)."""
    importance: Literal["probs", "gates"] = "probs"  # P from probabilities, or from gates (MoDE)
    pooled: bool = False
    """One loss from the rows of all layers and rounds together (Mixtral, RMoE), or of all layers
    that share a pool (ReXMoE)."""

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
        """The loss of each routing: this process's part, whose mean over processes is the loss; f
        is of the whole batch."""
        if self.statistics == "sequence" and routings[0].unit == "token":
            rows = [by_sequence(r, r.rows_mask().float(), True).sum(dim=1) for r in routings]
            counts = summed(*((rows_S > 0).float().sum() for rows_S in rows))
            each = [self._of_sequences(r, rows_S) for r, rows_S in zip(routings, rows)]
            return [over_total(total, count) for total, count in zip(each, counts)]
        return [self._of_batch(r, *load) for r, load in zip(routings, loads(routings))]

    def _of_sequences(self, routing: Routing, rows_S: Tensor) -> Tensor:
        """Scalar: added up over the sequences."""
        chosen = scored_columns(routing, routing.one_hot())
        counts_SE = by_sequence(routing, chosen, True).sum(dim=1)
        sums_SE = by_sequence(routing, self._shares(routing), True).sum(dim=1)
        return self._of(counts_SE, sums_SE / rows_S.clamp_min(1.0)[:, None], rows_S)

    def _of_batch(self, routing: Routing, counts_E: Tensor, rows: Tensor) -> Tensor:
        p = over_total(self._shares(routing).sum(dim=0), rows)
        return self._of(counts_E[None, : routing.num_scored], p[None], rows[None])

    def _shares(self, routing: Routing) -> Tensor:
        """[R, E], 0 in rows that do not count."""
        share = scored_columns(routing, self._importance(routing))
        return torch.where(routing.rows_mask()[:, None], share, torch.zeros_like(share))

    def _of(self, counts_SE: Tensor, p_SE: Tensor, rows_S: Tensor) -> Tensor:
        choices_S = counts_SE.sum(dim=1) if self.per_choice else rows_S
        f = counts_SE / choices_S.clamp_min(1.0)[:, None] * counts_SE.shape[1]
        p = p_SE
        if self.groups is not None:
            f = f.unflatten(1, (self.groups, -1)).mean(dim=2)
            p = p.unflatten(1, (self.groups, -1)).sum(dim=2)
        return (f * p).sum(dim=1).sum()

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
        if router.probability in ("identity", "softmax_tokens"):
            hint = "raw scores and shares of tokens are no shares; use contrastive, or softmax"
            raise ConfigError(describe("kind", self.kind, "a softmax or sigmoid router", hint))


@BALANCES.register
class ZLoss(BalancePart):
    """``mean(logsumexp(logits) ** 2)``: keeps logits small (arXiv:2202.08906)."""

    kind: Literal["z_loss"] = "z_loss"
    weight: NonNegativeFloat = 1e-3  # factor in the training loss

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        values = mean_rows(routings, map(self._of, routings))
        return tuple(term("z_loss", r, v, self.weight) for r, v in zip(routings, values))

    def value(self, routing: Routing) -> Tensor:
        return mean_rows([routing], [self._of(routing)])[0]

    def _of(self, routing: Routing) -> Tensor:
        return scored_columns(routing, routing.logits).logsumexp(dim=1).square()


@BALANCES.register
class EntropyLoss(BalancePart):
    """Mean entropy of the probabilities, in nats (dynamic routing, arXiv:2403.07652)."""

    kind: Literal["entropy"] = "entropy"
    weight: float = 1e-4
    """factor in the training loss; positive: fewer experts share a row's probability"""

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
    """``bias += rate * sign(mean load - load)`` once per optimiser step (DeepSeek-V3); no loss.

    Loads are summed over all micro-batches. Evaluation does not change the bias.
    """

    kind: Literal["selection_bias"] = "selection_bias"
    rate: PositiveFloat = 1e-3  # change of the bias per optimiser step

    def after_step(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """``routers`` in the order of the (layer, round) pairs of the routings; a router that
        serves several rounds is listed once for each."""
        places = sorted({(r.layer, r.round) for r in routings})
        if not places:
            return
        if len(places) != len(routers):
            raise ValueError(f"{len(routers)} routers for {len(places)} (layer, round) pairs")
        total: dict[int, Tensor] = {}
        owners: dict[int, Router] = {}
        of_place = dict(zip(places, routers))
        for routing, (counts, _) in zip(routings, loads(routings)):
            router, load = of_place[routing.layer, routing.round], counts[: routing.num_scored]
            owners[id(router)] = router
            total[id(router)] = total.get(id(router), torch.zeros_like(load)) + load
        for key, router in owners.items():
            if router.selection_bias is None:
                raise ValueError("a router without selection_bias cannot be updated")
            load = total[key]
            with torch.no_grad():
                step = self.rate * torch.sign(load.mean() - load)
                router.selection_bias += step.to(router.selection_bias)

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        if not router.selection_bias:
            hint = "there is no bias to update without"
            allowed = "a router with selection_bias=true"
            raise ConfigError(describe("kind", self.kind, allowed, hint))
