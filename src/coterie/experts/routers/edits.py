"""Ordered edits of the raw logits, before probabilities: deltas, candidate masks, jitter."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.experts.routers.base import EDITS, EditPart, draw, per_row


@EDITS.register
class BiasDelta(EditPart):
    """A trainable vector added to the logits, zero at the start (test-time rewiring)."""

    kind: Literal["bias_delta"] = "bias_delta"
    for_table: ClassVar[bool] = True

    def build(self, num_experts: int) -> nn.Module:
        return _Delta(num_experts)


class _Delta(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(num_experts))

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        return logits + self.delta.float()


@EDITS.register
class CandidateMask(EditPart):
    """Only these candidates may be chosen; their complement gets logit -inf.

    ``allowed``: one list for all rows. ``by_task``: one list per task, picked by ``ctx.task``.
    """

    kind: Literal["candidates"] = "candidates"
    allowed: tuple[NonNegativeInt, ...] = ()
    by_task: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.allowed) == bool(self.by_task):
            raise ConfigError(
                describe("allowed", self.allowed, "a non-empty list, or by_task instead of it")
            )
        if self.by_task and not all(self.by_task):
            raise ConfigError(describe("by_task", self.by_task, "no empty list"))
        return self

    def build(self, num_experts: int) -> nn.Module:
        return _Candidates(self.by_task or (self.allowed,), num_experts)

    def check(self, num_experts: int) -> None:
        for choice in self.by_task or (self.allowed,):
            if max(choice) >= num_experts:
                raise ConfigError(describe("allowed", choice, f"each in 0..{num_experts - 1}"))


class _Candidates(nn.Module):
    open: Tensor

    def __init__(self, lists: tuple[tuple[int, ...], ...], num_experts: int) -> None:
        super().__init__()
        table = torch.zeros(len(lists), num_experts, dtype=torch.bool)
        for row, allowed in enumerate(lists):
            table[row, list(allowed)] = True
        self.register_buffer("open", table, persistent=False)

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        if len(self.open) == 1:
            return logits.masked_fill(~self.open[0], -math.inf)
        if ctx.task is None:
            raise ConfigError("router.edits: candidates by_task need a task in the context")
        task = per_row(ctx.task, (ctx.batch, ctx.tokens), logits.shape[0])
        return logits.masked_fill(~self.open[task], -math.inf)


@EDITS.register
class ProgressiveCandidates(EditPart):
    """Training starts with ``start`` random candidates and ends with all (ReXMoE's PSR).

    The count grows linearly while ``ctx.progress`` goes from ``begin`` to ``end``; which ones are
    closed is drawn anew in each call from ``ctx.rng``. Evaluation always sees all.
    """

    kind: Literal["progressive"] = "progressive"
    start: PositiveInt
    begin: float = Field(default=0.1, ge=0.0, le=1.0)
    end: float = Field(default=0.3, ge=0.0, le=1.0)

    def count(self, progress: float, num_experts: int) -> int:
        """How many candidates are open."""
        if progress <= self.begin:
            return self.start
        if progress >= self.end:
            return num_experts
        share = (progress - self.begin) / (self.end - self.begin)
        return math.floor(self.start + share * (num_experts - self.start))

    def build(self, num_experts: int) -> nn.Module:
        return _Progressive(self)

    def check(self, num_experts: int) -> None:
        if self.start > num_experts:
            raise ConfigError(describe("start", self.start, f"1..{num_experts}"))


class _Progressive(nn.Module):
    def __init__(self, config: ProgressiveCandidates) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        if not ctx.training or ctx.rng is None:
            return logits
        num_experts = logits.shape[1]
        keep = self.config.count(ctx.progress, num_experts)
        order = draw(torch.Size([num_experts]), ctx.rng, logits).argsort()
        return logits.index_fill(1, order[keep:], -math.inf)


@EDITS.register
class Jitter(EditPart):
    """Noise while training: ``normal`` adds N(0, scale); ``uniform`` multiplies by 1 +- scale."""

    kind: Literal["jitter"] = "jitter"
    scale: PositiveFloat = 0.01
    form: Literal["normal", "uniform"] = "normal"

    def build(self, num_experts: int) -> nn.Module:
        return _Jitter(self)


class _Jitter(nn.Module):
    def __init__(self, config: Jitter) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        if not ctx.training or ctx.rng is None:
            return logits
        scale = self.config.scale
        if self.config.form == "uniform":
            noise = 2.0 * draw(logits.shape, ctx.rng, logits) - 1.0
            return logits * (1.0 + scale * noise)
        rng = ctx.rng
        noise = torch.randn(logits.shape, generator=rng, device=rng.device).to(logits.device)
        return logits + scale * noise
