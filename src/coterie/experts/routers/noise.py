"""Scores that depend on the noise level alone or on a fixed rule, not on the rows.

They route whole samples unless noted. Their choice is known for each step in advance, so that
caching and folding experts per step is exact.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Seed
from coterie.experts.routers.base import SCORES, Scored, ScoreModule, ScorePart, per_row
from coterie.experts.routers.scores import init_linear, linear_f32
from coterie.experts.windows import window_starts


@SCORES.register
class NoiseLevelScore(ScorePart):
    """A linear map of the time embedding, or two layers of it.

    ``W SiLU(tau(t)) + b`` (Switch-DiT, arXiv:2403.09176); two layers as in MoDE (arXiv:2412.12953).
    """

    kind: Literal["noise_level"] = "noise_level"
    hidden: NonNegativeInt = 0  # inner size of W2 GELU(W1 tau + b1) + b2; 0: one linear map
    silu: bool = True  # SiLU before the linear map
    init_std: NonNegativeFloat | None = None  # of the weights; null: the layer's rule
    table: bool = False  # also score every step of the grid, for losses on the usage map
    unit: ClassVar[Literal["token", "sample"] | None] = "sample"
    reads_rows: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("time_embedding",)

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _NoiseLevel(self, width if time_width is None else time_width, num_experts)


class _NoiseLevel(ScoreModule):
    def __init__(self, config: NoiseLevelScore, time_width: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(time_width, config.hidden) if config.hidden else None
        self.proj = nn.Linear(config.hidden or time_width, num_experts)

    def score(self, tau: Tensor) -> Tensor:
        """tau [*, D] -> logits [*, E]."""
        tau = tau.float()
        tau = F.silu(tau) if self.config.silu else tau
        if self.inner is not None:
            tau = F.gelu(linear_f32(self.inner, tau))
        return linear_f32(self.proj, tau)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        if ctx.time_embedding is None:
            raise ConfigError("router.score: noise_level needs a time embedding in the context")
        wants = self.config.table and ctx.time_table is not None
        return Scored(
            self.score(ctx.time_embedding),
            table=self.score(ctx.time_table()) if wants else None,
        )

    def reset_parameters(self, rng: Generator | None) -> None:
        for linear in (self.inner, self.proj):
            if linear is not None:
                init_linear(linear, self.config.init_std, rng)


def one_hot(ids: Tensor, num_experts: int) -> Tensor:
    """f32 [R, E]."""
    return F.one_hot(ids, num_experts).float()


@SCORES.register
class NoiseWindowScore(ScorePart):
    """Expert ``round((t / (T - 1)) ** alpha * (E - 1))`` for step t of the original grid (DTR).

    No parameters. With ``channel_window`` experts the id is the start of the open window.
    """

    kind: Literal["noise_window"] = "noise_window"
    alpha: PositiveFloat = 4.0  # exponent; with 1 and E = T the expert is the step
    unit: ClassVar[Literal["token", "sample"] | None] = "sample"
    reads_rows: ClassVar[bool] = False
    learned: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("step_index",)

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _NoiseWindow(self.alpha, num_experts)


class _NoiseWindow(ScoreModule):
    def __init__(self, alpha: float, num_experts: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.num_experts = num_experts

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        if ctx.step_index is None:
            raise ConfigError("router.score: noise_window needs a step index in the context")
        span = self.num_experts - 1
        starts = window_starts(ctx.step_index, ctx.num_steps, span, self.alpha)
        return Scored(one_hot(starts, self.num_experts))


@SCORES.register
class FixedScore(ScorePart):
    """A fixed rule: expert ``key mod E``, or a hash of the key."""

    kind: Literal["fixed"] = "fixed"
    by: Literal["position", "row", "task", "modality", "label", "sample"] = "position"
    """The key: ``position`` of the token, ``row`` in the batch (round robin, for timing), or the
    sample's task, modality, label or number."""
    hashed: bool = False  # use a fixed random hash of the key
    seed: Seed = 0  # of the hash
    learned: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The Context field of the key; positions are counted if the Context has none."""
        own = {"position": (), "row": (), "sample": ("sample_ids",)}
        return own.get(self.by, (self.by,))

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _Fixed(self, num_experts)


class _Fixed(ScoreModule):
    def __init__(self, config: FixedScore, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        key = self._key(x, ctx)
        if self.config.hashed:
            key = scramble(key, self.config.seed)
        return Scored(one_hot(torch.remainder(key, self.num_experts), self.num_experts))

    def _key(self, x: Tensor, ctx: Context) -> Tensor:
        rows, shape = x.shape[0], (ctx.batch, ctx.tokens)
        if self.config.by == "row":
            return torch.arange(rows, device=x.device)
        if self.config.by == "position":
            positions = ctx.positions
            if positions is None or positions.dim() == 1:
                line = torch.arange(ctx.tokens, device=x.device) if positions is None else positions
                positions = line.expand(ctx.batch, ctx.tokens)
            return per_row(positions, shape, rows)
        (name,) = self.config.reads
        value = getattr(ctx, name)
        if value is None:
            raise ConfigError(describe("router.score.by", self.config.by, "a field the model sets"))
        return per_row(value, shape, rows)


def scramble(key: Tensor, seed: int) -> Tensor:
    """A fixed integer hash: i64 -> non-negative i64 (multiply and xor-shift in 31 bits)."""
    mask = 0x7FFFFFFF
    value = (key + 1 + seed * 0x9E3779B1) & mask
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        value = ((value ^ (value >> 16)) * multiplier) & mask
    return value ^ (value >> 16)
