"""Edits of the logits before probabilities are computed: biases, masks, temperature, jitter."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Period
from coterie.core.rng import generator
from coterie.core.share import normal
from coterie.experts.routers.base import EDITS, EditPart, draw, draw_rows, own_candidates, per_row


@EDITS.register
class BiasDelta(EditPart):
    """A trainable bias per expert, zero at the start (for test-time adaptation)."""

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
    """Restricts the choice to some experts; the others get the logit -inf."""

    kind: Literal["candidates"] = "candidates"
    allowed: tuple[NonNegativeInt, ...] = ()  # experts that every row may use
    by_task: tuple[tuple[NonNegativeInt, ...], ...] = ()
    """for each task, the experts that it may use"""
    own: bool = False  # only the layer's own experts, where layers share a pool
    closes: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.allowed) + bool(self.by_task) + self.own != 1:
            hint = "or by_task, or own instead of it"
            raise ConfigError(describe("allowed", self.allowed, "a non-empty list", hint))
        if self.by_task and not all(self.by_task):
            hint = "a task without candidates has no expert"
            raise ConfigError(describe("by_task", self.by_task, "no empty list", hint))
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        return ("task",) if self.by_task else ()

    def build(self, num_experts: int) -> nn.Module:
        if self.own:
            return _Own()
        return _Candidates(self.by_task or (self.allowed,), num_experts)

    def check(self, num_experts: int) -> None:
        field = "by_task" if self.by_task else "allowed"
        for choice in () if self.own else self.by_task or (self.allowed,):
            if max(choice) >= num_experts:
                allowed, hint = f"each in 0..{num_experts - 1}", f"there are {num_experts} experts"
                raise ConfigError(describe(field, choice, allowed, hint))


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


class _Own(nn.Module):
    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        own = own_candidates(ctx, logits.shape[1])
        return keep_only(logits, torch.arange(own.start, own.stop, device=logits.device))


@EDITS.register
class ProgressiveCandidates(EditPart):
    """Progressive scaling routing (ReXMoE, arXiv:2510.17483): few experts at first, all at the end.

    Open experts are drawn anew in each pass. In evaluation all are open. ``masks`` ``probs`` is the
    paper's order: closed experts get probability 0 after the softmax.
    """

    kind: Literal["progressive"] = "progressive"
    start: PositiveInt | None = None  # open experts at first; null: as many as the layer owns
    begin: float = Field(default=0.1, ge=0.0, le=1.0)
    """share of training at which the number starts to grow"""
    end: float = Field(default=0.3, ge=0.0, le=1.0)  # share of training from which all are open
    mode: Literal["linear", "steps"] = "linear"  # growth by one at a time, or in steps of ``start``
    order: Literal["random", "own_first"] = "random"  # own_first: the layer's own are always open
    drawn: Literal["layer", "pool"] = "layer"  # drawn for each layer, or once for a pool
    closes: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if self.end < self.begin:
            hint = "the candidates open between the two"
            raise ConfigError(describe("end", self.end, f"{self.begin} (begin) or more", hint))
        return self

    def count(self, progress: float, num_experts: int, start: int) -> int:
        """Number of open experts out of ``num_experts``."""
        if progress <= self.begin:
            return start
        if progress >= self.end:
            return num_experts
        share = (progress - self.begin) / (self.end - self.begin)
        if self.mode == "steps":
            # Groups of ``start`` open at begin, ..., end: the last one when progress reaches it.
            groups = math.ceil(num_experts / start)
            return min(num_experts, start * (1 + math.floor(share * (groups - 1))))
        return math.floor(start + share * (num_experts - start))

    def build(self, num_experts: int) -> nn.Module:
        return _Progressive(self)

    def fewest(self, num_experts: int) -> int:
        return self.start or num_experts

    def check(self, num_experts: int) -> None:
        if self.start is not None and self.start > num_experts:
            hint = f"a layer owns {num_experts} experts"
            raise ConfigError(describe("start", self.start, f"1..{num_experts}", hint))


class _Progressive(nn.Module):
    def __init__(self, config: ProgressiveCandidates) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        if not ctx.training or ctx.rng is None:
            return logits
        num_experts = logits.shape[1]
        own = own_candidates(ctx, num_experts)
        start = self.config.start or own.stop - own.start
        keep = self.config.count(ctx.progress, num_experts, start)
        rng = ctx.rng
        if self.config.drawn == "pool":
            rng = generator(ctx.pass_seed, "progressive", ctx.slot, *ctx.pool_layers)
        keys = draw(torch.Size([num_experts]), rng, logits)
        if self.config.order == "own_first":
            keys[own] -= 1.0
        return keep_only(logits, keys.argsort()[:keep])


@EDITS.register
class OpeningCandidates(EditPart):
    """Experts that are closed at first and open as training goes on, for experts added to a model.

    A buffer ``share`` [E] multiplies the odds of each expert: at 1 it is open, at 0 or less closed,
    with probability 0. It grows by 1 / ``steps`` after each optimiser step. A new router is open;
    ``convert.extend_reuse`` closes the experts that it adds. Evaluation uses the same ``share``.
    """

    kind: Literal["opening"] = "opening"
    for_table: ClassVar[bool] = True
    steps: Period = 1000  # optimiser steps until an added expert is open

    def build(self, num_experts: int) -> nn.Module:
        return Opening(self, num_experts)


class Opening(nn.Module):
    """The buffer ``share`` of :class:`OpeningCandidates`; a share of -x delays by x times
    ``steps``."""

    share: Tensor

    def __init__(self, config: OpeningCandidates, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("share", torch.ones(num_experts))

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        return logits + self.share.clamp(0.0, 1.0).log()  # + 0 where open: not a bit changes

    def after_step(self) -> None:
        """Once per optimiser step."""
        self.share.add_(1.0 / self.config.steps).clamp_(max=1.0)


def keep_only(logits: Tensor, candidates: Tensor) -> Tensor:
    """-inf in all columns but ``candidates`` i64 [K]."""
    closed = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill(closed.index_fill(0, candidates, 0), -math.inf)


@EDITS.register
class Temperature(EditPart):
    """Logits divided by a temperature; a high one gives even gates, so that every expert learns.

    It falls linearly from ``start`` to ``end`` (Dynamic Convolution, arXiv:1912.03458: 30 to 1 in
    the first epochs). Evaluation uses ``end``.
    """

    kind: Literal["temperature"] = "temperature"
    start: PositiveFloat = 1.0  # temperature at the start of training
    end: PositiveFloat = 1.0  # temperature later, and in evaluation
    until: float = Field(default=0.1, gt=0.0, le=1.0)
    """share of training at which ``end`` is reached"""
    for_table: ClassVar[bool] = True

    def build(self, num_experts: int) -> nn.Module:
        return _Temperature(self)


class _Temperature(nn.Module):
    def __init__(self, config: Temperature) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, ctx: Context) -> Tensor:
        start, end = self.config.start, self.config.end
        share = min(1.0, ctx.progress / self.config.until) if ctx.training else 1.0
        return logits / (start + share * (end - start))


@EDITS.register
class Jitter(EditPart):
    """Random noise on the logits in training."""

    kind: Literal["jitter"] = "jitter"
    scale: PositiveFloat = 0.01  # standard deviation, or relative range
    form: Literal["normal", "uniform"] = "normal"
    """normal adds N(0, scale); uniform multiplies by 1 +- scale"""
    draws: ClassVar[bool] = True

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
            noise = 2.0 * draw_rows(logits.shape, ctx.rng, logits) - 1.0
            return logits * (1.0 + scale * noise)
        return logits + scale * normal(logits.shape, ctx.rng).to(logits.device)
