"""Selections: which experts each row uses; for expert choice, which tokens each expert takes.

All return ids i64 [R, K] in order of preference; the id E, the number of experts, marks an unused
choice.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.graphs import recorded
from coterie.experts.routers.base import SELECTS, SelectPart, draw_rows

_FEW = 4  # up to here k passes of argmax beat one stable sort


def top_ids(scores: Tensor, k: int) -> Tensor:
    """i64 [R, k]: the k best per row, ties to the lowest index (``topk`` promises no order)."""
    if k <= _FEW:
        left, chosen = scores.detach(), []
        for _ in range(k):
            best = left.argmax(dim=1, keepdim=True)
            # Judged before the scatter: a row without candidates left would offer one again.
            chosen.append(_drop_masked(left, best))
            left = left.scatter(1, best, float("-inf"))
        return torch.cat(chosen, dim=1)
    ids = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _drop_masked(scores, ids)


def _drop_masked(scores: Tensor, ids: Tensor) -> Tensor:
    """Choices whose score is -inf were no candidates: nobody."""
    dead = scores.detach().gather(1, ids) == float("-inf")
    return ids.masked_fill(dead, scores.shape[1])


class _K(SelectPart):
    """Selections of a fixed number of experts per row."""

    k: PositiveInt = 2  # experts per row

    @property
    def least(self) -> int:
        return self.k

    def expected(self, num_experts: int) -> float:
        return float(self.k)

    def check(self, num_experts: int) -> None:
        if self.k > num_experts:
            allowed = f"k <= E, that is 1..{num_experts}"
            raise ConfigError(describe("k", self.k, allowed, f"k > E: {self.k} > {num_experts}"))


@SELECTS.register
class TopK(_K):
    """The k experts with the highest scores."""

    kind: Literal["top_k"] = "top_k"

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        return top_ids(scores, self.k)


@SELECTS.register
class RandomK(_K):
    """In training k experts drawn by their probabilities, without replacement; else the k best.

    As in MoDE (arXiv:2412.12953). Without ``ctx.rng`` the k best.
    """

    kind: Literal["random"] = "random"
    draws: ClassVar[bool] = True
    by_probability: ClassVar[bool] = True

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        if not ctx.training or ctx.rng is None:
            return top_ids(scores, self.k)
        floor = torch.finfo(torch.float32).tiny
        uniform = draw_rows(scores.shape, ctx.rng, scores).clamp_min(floor)
        gumbel = -(-uniform.log()).clamp_min(floor).log()
        masked = scores.detach() == float("-inf")
        keys = scores.detach().clamp_min(floor).log() + gumbel
        return top_ids(keys.masked_fill(masked, float("-inf")), self.k)


@SELECTS.register
class Dense(SelectPart):
    """All experts."""

    kind: Literal["dense"] = "dense"

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return _drop_masked(scores, ids)

    def expected(self, num_experts: int) -> float:
        return float(num_experts)


@SELECTS.register
class TopP(SelectPart):
    """The fewest experts whose probabilities add up to more than p, the last one included.

    Dynamic routing, arXiv:2403.07652.
    """

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.4, gt=0.0, le=1.0)  # threshold of the summed probability
    min_k: PositiveInt = 1  # least number of experts
    max_k: PositiveInt | None = None  # most experts; null: all
    by_probability: ClassVar[bool] = True

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        num_experts = scores.shape[1]
        limit = num_experts if self.max_k is None else self.max_k
        ranked, ids = scores.detach().sort(dim=1, descending=True, stable=True)
        before = ranked.clamp_min(0.0).double().cumsum(dim=1)
        # Rounded probabilities may sum to more than 1: p = 1 means all of them nevertheless.
        enough = before > self.p if self.p < 1 else torch.zeros_like(before, dtype=torch.bool)
        needed = (1 + (~enough).sum(dim=1)).clamp(self.min_k, limit)
        if recorded():  # other rows may need more
            widest = limit
        else:
            widest = int(needed.max()) if needed.numel() else 1
        rank = torch.arange(num_experts, device=scores.device)
        ids = ids.masked_fill(rank >= needed[:, None], num_experts)
        ids = ids.masked_fill(ranked == float("-inf"), num_experts)
        return ids[:, : min(widest, num_experts)]

    def expected(self, num_experts: int) -> float:
        return float(num_experts if self.max_k is None else self.max_k)

    def check(self, num_experts: int) -> None:
        high = num_experts if self.max_k is None else self.max_k
        if high > num_experts:
            hint = f"there are {num_experts} experts"
            raise ConfigError(describe("max_k", high, f"1..{num_experts}", hint))
        if self.min_k > high:
            hint = "a row may use at most that many experts"
            raise ConfigError(describe("min_k", self.min_k, f"1..{high}", hint))


@SELECTS.register
class Rank(SelectPart):
    """The experts at given ranks, such as (1,) for the second best."""

    kind: Literal["rank"] = "rank"
    ranks: tuple[NonNegativeInt, ...] = (0, 1)  # 0 is the best

    @property
    def least(self) -> int:
        return 1 + max(self.ranks, default=0)

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        order = scores.detach().sort(dim=1, descending=True, stable=True).indices
        wanted = torch.tensor(self.ranks, device=scores.device)
        return _drop_masked(scores, order.index_select(1, wanted))

    def expected(self, num_experts: int) -> float:
        return float(len(self.ranks))

    def check(self, num_experts: int) -> None:
        if not self.ranks or len(set(self.ranks)) != len(self.ranks):
            raise ConfigError(describe("ranks", self.ranks, "at least one, all different"))
        if max(self.ranks) >= num_experts:
            allowed, hint = f"each in 0..{num_experts - 1}", f"there are {num_experts} experts"
            raise ConfigError(describe("ranks", self.ranks, allowed, hint))


@SELECTS.register
class Fixed(SelectPart):
    """Always the same experts, whatever the scores (ablations, runs of a single expert)."""

    kind: Literal["fixed"] = "fixed"
    ids: tuple[NonNegativeInt, ...] = (0,)  # the experts
    ignores_scores: ClassVar[bool] = True

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        ids = torch.tensor(self.ids, device=scores.device).expand(scores.shape[0], -1)
        return _drop_masked(scores, ids)

    def expected(self, num_experts: int) -> float:
        return float(len(self.ids))

    def check(self, num_experts: int) -> None:
        if not self.ids or len(set(self.ids)) != len(self.ids):
            raise ConfigError(describe("ids", self.ids, "at least one, all different"))
        if max(self.ids) >= num_experts:
            allowed, hint = f"each in 0..{num_experts - 1}", f"there are {num_experts} experts"
            raise ConfigError(describe("ids", self.ids, allowed, hint))


@SELECTS.register
class GroupLimited(_K):
    """The k best experts within the best groups of consecutive experts."""

    kind: Literal["group_limited"] = "group_limited"
    groups: PositiveInt = 2  # number of groups of equal size
    top_groups: PositiveInt = 1  # groups that a row may use
    group_score: Literal["max", "top2_sum"] = "max"
    """A group's score: its best expert (DeepSeek-V2, arXiv:2405.04434), or the sum of its two best
    (DeepSeek-V3, arXiv:2412.19437)."""

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        rows, num_experts = scores.shape
        grouped = scores.detach().view(rows, self.groups, num_experts // self.groups)
        if self.group_score == "max" or grouped.shape[2] == 1:
            strength = grouped.amax(dim=2)
        else:
            best = grouped.topk(2, dim=2).values
            strength = best[..., 0] + best[..., 1].masked_fill(best[..., 1] == float("-inf"), 0.0)
        kept = torch.zeros(rows, self.groups + 1, dtype=torch.bool, device=scores.device)
        kept.scatter_(1, top_ids(strength, self.top_groups), 1)
        open_ = kept[:, : self.groups, None].expand_as(grouped).reshape(rows, num_experts)
        return top_ids(scores.masked_fill(~open_, float("-inf")), self.k)

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if num_experts % self.groups:
            hint = f"groups are equal parts of the {num_experts} experts"
            raise ConfigError(describe("groups", self.groups, f"a divisor of {num_experts}", hint))
        if self.top_groups > self.groups:
            hint = f"there are {self.groups} groups"
            raise ConfigError(describe("top_groups", self.top_groups, f"1..{self.groups}", hint))
        reach = self.top_groups * (num_experts // self.groups)
        if self.k > reach:
            hint = f"the kept groups hold {reach} experts"
            raise ConfigError(describe("k", self.k, f"1..{reach}", hint))


@SELECTS.register
class ExpertChoice(SelectPart):
    """Each expert takes its best tokens of each sample; a token may have several experts or none.

    The number of tokens per expert is ``max(1, min(floor(N / E * k), N))`` (arXiv:2202.09368; per
    sample as in ProMoE).
    """

    kind: Literal["expert_choice"] = "expert_choice"
    k: PositiveFloat = 1.0  # mean number of experts per token; need not be whole
    needs_tokens: ClassVar[bool] = True

    def capacity(self, tokens: int, num_experts: int) -> int:
        """Tokens of a sample that each expert takes."""
        return max(1, min(int(tokens / num_experts * self.k), tokens))

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        (batch, tokens), num_experts = shape, scores.shape[1]
        if scores.shape[0] == 0:
            return scores.new_zeros(0, 1, dtype=torch.int64)
        free = scores.detach()
        if valid is not None:
            free = free.masked_fill(~valid[:, None], float("-inf"))
        by_expert = free.view(batch, tokens, num_experts).transpose(1, 2).flatten(0, 1)
        taken = top_ids(by_expert, self.capacity(tokens, num_experts))
        chosen = torch.zeros(batch * num_experts, tokens + 1, dtype=torch.bool, device=free.device)
        chosen.scatter_(1, taken, 1)
        chosen = chosen[:, :tokens].view(batch, num_experts, tokens).transpose(1, 2).flatten(0, 1)
        most = num_experts if recorded() else max(1, int(chosen.sum(dim=1).max()))
        return top_ids(free.masked_fill(~chosen, float("-inf")), min(most, num_experts))

    def expected(self, num_experts: int) -> float:
        return min(self.k, float(num_experts))
