"""Routing contrastive loss of ProMoE (arXiv:2510.24711). Legend: R rows, E experts, V valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Aux, Routing
from coterie.core.share import summed
from coterie.experts.balance.base import BALANCES, BalancePart, by_sequence, scored_columns, term
from coterie.experts.routers import CosineScore, RouterConfig


@BALANCES.register
class ContrastiveBalance(BalancePart):
    """Routing contrastive loss: cross-entropy of ``cos(P_i, mu_j) / tau`` with target j = i.

    P_i is the prototype of expert i, mu_j the mean of the rows that chose expert j, with gradient.
    Experts without rows are left out; the loss is 0 for fewer than two.
    """

    kind: Literal["contrastive"] = "contrastive"
    weight: NonNegativeFloat = 1.0  # factor in the training loss
    tau: PositiveFloat = 0.07  # temperature
    statistics: Literal["batch", "sequence"] = "batch"
    """Means over the batch (token choice), or per sample and then averaged (expert choice)."""

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        return tuple(term("contrastive", r, self.value(r), self.weight) for r in routings)

    def value(self, routing: Routing) -> Tensor:
        """Scalar, float32."""
        inputs, prototypes = routing.inputs, routing.prototypes
        if inputs is None or prototypes is None:
            raise ValueError("the contrastive loss needs routings with inputs and prototypes")
        apart = self.statistics == "sequence" and routing.unit == "token"
        chosen = (scored_columns(routing, routing.one_hot()) > 0).float()
        chosen_SRE = by_sequence(routing, chosen, apart)
        # Masked rows have no choice, so 0 * x drops them; where() also drops NaN padding.
        rows = torch.where(chosen.any(dim=1)[:, None], inputs.float(), 0.0)
        rows_SRD = by_sequence(routing, rows, apart)
        count_SE, sum_SED = chosen_SRE.sum(dim=1), chosen_SRE.transpose(1, 2) @ rows_SRD
        if not apart:
            count_SE, sum_SED = summed(count_SE, sum_SED)
        mean_SED = sum_SED / count_SE.clamp_min(1.0)[:, :, None]
        total, usable = self._cross_entropy(prototypes.float(), mean_SED, count_SE > 0)
        if apart:
            total, usable = summed(total, usable)
        return total / usable.clamp_min(1)

    def _cross_entropy(
        self, prototypes: Tensor, means: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scalars: the sum over samples and experts, and how many of them take part."""
        similarity = F.normalize(prototypes, dim=-1) @ F.normalize(means, dim=-1).transpose(1, 2)
        logits_SEE = similarity / self.tau
        usable = valid & (valid.sum(dim=1, keepdim=True) >= 2)
        # ln(1 + sum over the others of exp(s_j - s_i)): near 0, -log_softmax would round it away.
        away_SEE = logits_SEE - logits_SEE.diagonal(dim1=1, dim2=2)[:, :, None]
        own = torch.eye(away_SEE.shape[1], dtype=torch.bool, device=away_SEE.device)
        away_SEE = away_SEE.masked_fill(own | ~valid[:, None, :], float("-inf"))
        # Rows of an invalid expert keep a finite dummy so that their gradient is 0, not NaN.
        safe = torch.where(usable[:, :, None], away_SEE, torch.zeros_like(away_SEE))
        loss_SE = F.softplus(safe.logsumexp(dim=2))
        kept = torch.where(usable, loss_SE, torch.zeros_like(loss_SE))
        return kept.sum(), usable.float().sum()

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        if not isinstance(router.score, CosineScore):
            hint = "it moves prototypes towards the rows that chose them"
            allowed = "a router with cosine prototypes"
            raise ConfigError(describe("kind", self.kind, allowed, hint))
