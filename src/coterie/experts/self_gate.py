"""A second gate for each task's own experts, added to the router's gates (HoME, arXiv:2408.05430).

``y = sum_e g_e E_e + sum_{j own} s_j E_j``. So a task's own expert contributes, and learns, even if
the router gives it a small gate. s is a sigmoid where a task owns one expert and a softmax where it
owns several. Legend: B samples, N rows of a sample, D width, T tasks, P the most experts that a
task owns, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import NonNegativeInt, model_validator
from torch import Generator, Tensor, nn

from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Routing
from coterie.experts.kinds import ExpertKind
from coterie.experts.routers import CandidateMask, RouterConfig
from coterie.experts.routers.base import mean_tokens, per_row
from coterie.experts.routers.scores import init_linear, linear_by_task


class SelfGateConfig(Config):
    """Which experts belong to which task."""

    by_task: tuple[tuple[NonNegativeInt, ...], ...]
    """for each task, the experts that it owns; may be empty"""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(self.by_task):
            raise ConfigError(describe("by_task", self.by_task, "own experts of some task"))
        if any(len(set(own)) < len(own) for own in self.by_task):
            raise ConfigError(describe("by_task", self.by_task, "each expert once in a list"))
        return self

    def check(self, router: RouterConfig, kind: ExpertKind, num_experts: int) -> None:
        """ConfigError if an own expert does not exist, could be masked out by the router, or reads
        another stream than the task's other experts."""
        if router.select.kind != "dense":
            hint = "an expert that is not selected does not answer"
            raise ConfigError(describe("by_task", router.select.kind, "router.select dense", hint))
        for own in self.by_task:
            if own and max(own) >= num_experts:
                allowed = f"each in 0..{num_experts - 1}"
                raise ConfigError(describe("by_task", own, allowed, f"{num_experts} experts"))
            if len(streams_of(kind, own)) > 1:
                hint = "the gate reads what they read"
                raise ConfigError(describe("by_task", own, "experts of one stream", hint))
        for edit in router.edits:
            if isinstance(edit, CandidateMask) and edit.by_task:
                for task, (own, open_) in enumerate(zip(self.by_task, edit.by_task)):
                    if not set(own) <= set(open_):
                        hint = f"task {task} has candidates {open_}"
                        raise ConfigError(describe("by_task", own, "some of them", hint))

    def build(self, kind: ExpertKind, width: int, num_experts: int) -> SelfGate:
        return SelfGate(self, kind, width, num_experts)


def streams_of(kind: ExpertKind, experts: Sequence[int]) -> set[int]:
    """Indices of the parts of a row that some experts read, where a row has several."""
    reads = getattr(kind, "reads", None)
    return set() if reads is None else {reads[e] for e in experts}


class SelfGate(nn.Module):
    """``forward(h [B, N, D], routing, ctx) -> routing`` with the second gates added.

    The gates read the same stream as the task's own experts.
    """

    own: Tensor
    stream: Tensor

    def __init__(
        self, config: SelfGateConfig, kind: ExpertKind, width: int, num_experts: int
    ) -> None:
        super().__init__()
        most = max(len(own) for own in config.by_task)
        self.streams = width // kind.stream_width(width)
        self.num_experts = num_experts
        filled = [[*own, *[num_experts] * (most - len(own))] for own in config.by_task]
        self.register_buffer("own", torch.tensor(filled), persistent=False)  # i64 [T, P]
        stream = torch.tensor([next(iter(streams_of(kind, own)), 0) for own in config.by_task])
        self.register_buffer("stream", stream, persistent=False)  # i64 [T]
        self.proj = nn.Linear(kind.stream_width(width), len(filled) * most, bias=False)
        self.reset_parameters()

    def reset_parameters(self, rng: Generator | None = None, std: float | None = None) -> None:
        if self.proj.weight.device.type != "meta":
            init_linear(self.proj, std, rng)

    def forward(self, h: Tensor, routing: Routing, ctx: Context) -> Routing:
        if ctx.task is None:
            raise ConfigError("self_gate: it needs a task in the context")
        with torch.autocast(device_type=h.device.type, enabled=False):
            added = self._gates(h, routing, ctx)
        open_ = routing.ids < routing.num_experts  # closed and masked rows stay closed
        return routing.replace(gates=routing.gates + added * open_)

    def _gates(self, h: Tensor, routing: Routing, ctx: Context) -> Tensor:
        """f32 [R, E], 0 for all but the own experts of each row's task."""
        rows = len(routing.ids)
        x = h if routing.unit == "token" else mean_tokens(h, ctx.token_mask)[:, None]
        task = per_row(ctx.task, routing.batch, rows)  # type: ignore[arg-type]
        parts = x.unflatten(-1, (self.streams, -1))  # a view, also of rows that are repeated
        index = self.stream[task].view(*x.shape[:2], 1, 1).expand(*x.shape[:2], 1, parts.shape[-1])
        read = parts.gather(2, index).flatten(0, 2).float()
        own = self.own[task]
        logits = linear_by_task(self.proj, len(self.own), read, task, x.shape[1])
        logits = logits.masked_fill(own == self.num_experts, float("-inf"))
        count = (own < self.num_experts).sum(1, keepdim=True)
        several = logits.masked_fill(count == 0, 0.0).softmax(dim=1)
        gates = torch.where(count > 1, several, logits.sigmoid())
        full = gates.new_zeros(rows, self.num_experts + 1)
        return full.scatter(1, own, gates)[:, : self.num_experts]
