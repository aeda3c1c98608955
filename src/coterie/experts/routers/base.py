"""Base classes and registries of a router's parts.

Legend: R rows, E experts, D width, S steps of the noise grid, B samples, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self, TypeVar

import torch
from pydantic import model_validator
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part, Registry
from coterie.core.share import uniform

SCORES = Registry("score", "coterie.scores")
EDITS = Registry("edit", "coterie.edits")
SELECTS = Registry("select", "coterie.selects")


@dataclass(frozen=True, eq=False)
class Scored:
    """Logits of one call, and what the losses for this kind of router need."""

    logits: Tensor  # f32 [R, E]
    prototypes: Tensor | None = None  # [E, D], of routers that compare rows with prototypes
    table: Tensor | None = None  # f32 [S, E], logits of every step
    state: Tensor | None = None  # [R, P], of recurrent routers


class ScoreModule(nn.Module):
    """Maps rows x f32 [R, D] and the context to logits [R, E]."""

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        raise NotImplementedError

    def reset_parameters(self, rng: Generator | None) -> None:
        """Own initialisation, applied after any generic pass."""


class ScorePart(Part):
    """Base of scores: a part that computes one logit per row and expert."""

    kind: str
    unit: ClassVar[Literal["token", "sample"] | None] = None
    """None: the router's configuration decides."""
    reads_rows: ClassVar[bool] = True
    """Whether logits depend on the rows themselves (else on the context alone)."""
    learned: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    """Whether it draws random numbers in training, from ``ctx.rng``."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Context fields that the score needs."""
        return ()

    @property
    def state_size(self) -> int:
        """Size of the state that is passed from layer to layer; 0: none."""
        return 0

    def check(self, num_experts: int, width: int) -> None:
        """ConfigError if the score does not fit this number of experts or this width."""

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        """The module ``(x f32 [R, D], ctx) -> Scored``."""
        raise NotImplementedError


class EditPart(Part):
    """Base of edits: a part that changes the logits before experts are selected."""

    kind: str
    for_table: ClassVar[bool] = False
    """Whether the edit also applies to the table of all steps (it must not depend on rows)."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers in training."""
    closes: ClassVar[bool] = False
    """Whether the edit excludes experts, by the logit -inf."""
    masks: Literal["logits", "probs"] = "logits"
    """When experts are excluded: in the logits, or (``probs``) after the softmax, by
    probability 0."""

    @model_validator(mode="after")
    def _masks_what_it_closes(self) -> Self:
        if self.masks == "probs" and not self.closes:
            hint = "this edit closes no candidates"
            raise ConfigError(describe("masks", self.masks, "logits", hint))
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """Context fields that the edit needs."""
        return ()

    def build(self, num_experts: int) -> nn.Module:
        """``module(logits, ctx) -> logits``; an ``after_step()`` of it runs after each optimiser
        step."""
        raise NotImplementedError

    def fewest(self, num_experts: int) -> int:
        """The least number of experts that a row can choose among in training."""
        return num_experts

    def check(self, num_experts: int) -> None:
        """ConfigError if the edit does not fit this number of experts."""


class SelectPart(Part):
    """Base of selections: scores f32 [R, E] -> ids i64 [R, K], best first; the id E marks an unused
    choice.

    A score of -inf is never chosen. Ties go to the lowest index.
    """

    kind: str
    needs_tokens: ClassVar[bool] = False
    """Whether a row's choice depends on the other tokens of its sample."""
    by_probability: ClassVar[bool] = False
    """Whether scores must be probabilities."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers in training."""
    ignores_scores: ClassVar[bool] = False
    """Whether the choice is independent of the scores, except for excluded experts."""

    def select(
        self, scores: Tensor, ctx: Context, shape: tuple[int, int], valid: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    @property
    def least(self) -> int:
        """The number of experts that must not be excluded for a row."""
        return 1

    def expected(self, num_experts: int) -> float:
        """Experts used per row (an upper limit if it varies), for active parameter counts."""
        raise NotImplementedError

    def check(self, num_experts: int) -> None:
        """ConfigError if the selection does not fit this number of experts."""


PartT = TypeVar("PartT", bound=Part)


def starting(part: PartT, std: float) -> PartT:
    """``part`` with ``init_std`` = ``std``, also in parts inside it, wherever it is unset."""
    changes: dict[str, object] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Part):
            changes[name] = starting(value, std)
        elif name == "init_std" and value is None:
            changes[name] = std
    return part.replace(**changes) if changes else part


def own_candidates(ctx: Context, num_experts: int) -> slice:
    """Indices of the experts that this layer owns; all of them if no pool is shared."""
    if not ctx.pool_layers:
        return slice(0, num_experts)
    each = num_experts // len(ctx.pool_layers)
    first = each * ctx.pool_layers.index(ctx.layer)
    return slice(first, first + each)


def per_row(value: Tensor, shape: tuple[int, int], rows: int) -> Tensor:
    """A value per sample [B], per token [B, N] or per position [N], as one value per row [R]."""
    batch, tokens = shape
    if rows == batch * tokens and value.dim() == 2:
        return value.expand(batch, tokens).reshape(-1)
    if value.shape[0] != batch:
        raise ValueError(f"expected {batch} samples, got {tuple(value.shape)}")
    if value.dim() == 2:
        value = value[:, 0]
    return value if rows == batch else value.repeat_interleave(tokens)


def draw(shape: torch.Size, rng: Generator, like: Tensor) -> Tensor:
    """f32 uniform [0, 1) noise from ``rng``, moved to the device of ``like``."""
    values = torch.rand(shape, generator=rng, device=rng.device)
    if torch.jit.is_tracing():  # a constant of the graph, which would else draw in each run
        values = torch.from_numpy(values.cpu().numpy())
    return values.to(like.device)


def draw_rows(shape: torch.Size, rng: Generator, like: Tensor) -> Tensor:
    """As :func:`draw`, where the first dimension are the rows of a batch."""
    return uniform(shape, rng).to(like.device)


def mean_tokens(h: Tensor, mask: Tensor | None) -> Tensor:
    """f32 [B, D]: mean over the tokens of h [B, N, D] that ``mask`` bool [B, N] keeps; 0 where a
    sample has none."""
    if mask is None:
        return h.float().sum(dim=1) / max(1, h.shape[1])
    kept = h.masked_fill(~mask[:, :, None], 0.0)
    return kept.float().sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
