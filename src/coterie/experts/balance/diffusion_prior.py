"""Diffusion prior loss of Switch-DiT (arXiv:2403.09176): near noise levels share experts.

Legend: T steps, L layers, E experts per layer, U = L*E expert units, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Aux, Routing
from coterie.core.share import summed
from coterie.experts.balance.base import BALANCES, BalancePart, scored_columns
from coterie.experts.routers import NoiseLevelScore, RouterConfig, TopK, top_ids
from coterie.experts.windows import sliding_windows


@BALANCES.register
class DiffusionPrior(BalancePart):
    """``mean_b JSD(P_b, R_b)``: P the layers' probabilities at the sample's step, R the prior.

    The prior's map Q slides a window of L*K units over all U; a Hungarian assignment (without
    gradient) matches the usage map of all T steps to it. One loss for the whole model.
    """

    kind: Literal["diffusion_prior"] = "diffusion_prior"
    weight: NonNegativeFloat = 1.0  # factor in the training loss
    alpha: PositiveFloat = 4.0
    """exponent of the window's position; above 1, noisy steps lie further apart"""
    eps: PositiveFloat = 1e-6  # added inside the logarithms

    def losses(self, routings: Sequence[Routing], rng: Generator | None = None) -> tuple[Aux, ...]:
        usable = sorted(
            (r for r in routings if r.table is not None), key=lambda r: (r.layer, r.round)
        )
        if not usable:
            return ()
        return (Aux("diffusion_prior", self.value(usable, rng), self.weight, None),)

    def value(self, routings: Sequence[Routing], rng: Generator | None = None) -> Tensor:
        """Scalar, float32; the gradient flows through the probabilities only."""
        first = routings[0]
        if first.step_index is None:
            raise ValueError("the diffusion prior needs the step index of each sample")
        usage = usage_map(routings)
        steps, units = usage.shape
        size = sum(r.top_k for r in routings)
        prior = sliding_windows(steps, units, size, self.alpha).to(usage.device)
        column = match_columns(usage, prior, rng).to(usage.device)
        target = prior[first.step_index][:, column].float()
        target = target / target.sum(dim=1, keepdim=True)
        probs = [scored_columns(r, r.probs) for r in routings]
        share = torch.cat(probs, dim=1) / len(routings)
        each = jensen_shannon(share, target, self.eps)
        keep = first.rows_mask().float()
        total, count = summed((each * keep).sum(), keep.sum())
        return total / count.clamp_min(1.0)

    def check(self, router: RouterConfig, num_experts: int | None) -> None:
        score = router.score
        if not (isinstance(score, NoiseLevelScore) and score.table):
            hint = "it compares the choices at every noise level"
            allowed = "a noise_level router with table=true"
            raise ConfigError(describe("kind", self.kind, allowed, hint))
        if router.probability != "softmax" or not isinstance(router.select, TopK):
            hint = "the prior is a distribution over windows of k experts"
            raise ConfigError(describe("kind", self.kind, "a softmax router with top_k", hint))


def usage_map(routings: Sequence[Routing]) -> Tensor:
    """bool [T, U]: which expert units each step of the grid uses."""
    maps = []
    for routing in routings:
        assert routing.table is not None
        table = routing.table.detach()
        used = torch.zeros_like(table, dtype=torch.bool)
        maps.append(used.scatter_(1, top_ids(table, routing.top_k), 1))
    return torch.cat(maps, dim=1)


def match_columns(usage: Tensor, prior: Tensor, rng: Generator | None) -> Tensor:
    """i64 [U]: the prior column of each unit, least total disagreement over all steps.

    Both column orders are permuted first so that ties break at random, not towards expert 0.
    """
    from scipy.optimize import linear_sum_assignment

    units = usage.shape[1]
    if rng is None:
        mine, theirs = torch.arange(units), torch.arange(units)
    else:
        draws = torch.rand(2, units, generator=rng, device=rng.device).cpu()
        mine, theirs = draws[0].argsort(), draws[1].argsort()
    g = usage.cpu()[:, mine].float()
    q = prior.cpu()[:, theirs].float()
    cost = g.T @ (1.0 - q) + (1.0 - g).T @ q
    rows, columns = linear_sum_assignment(cost.numpy())
    matched = torch.empty(units, dtype=torch.int64)
    matched[mine[torch.from_numpy(rows)]] = theirs[torch.from_numpy(columns)]
    return matched


def jensen_shannon(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """Per row, natural logarithm, in [0, ln 2] up to ``eps`` inside the logarithms."""
    middle = (p + q) / 2
    left = (p * ((p + eps).log() - (middle + eps).log())).sum(dim=-1)
    right = (q * ((q + eps).log() - (middle + eps).log())).sum(dim=-1)
    return (left + right) / 2
