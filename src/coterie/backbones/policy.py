"""A robot policy: a transformer over noise level, goal, observations and noisy actions (MoDE,
arXiv:2412.12953).

The noise level is a token and, with ``modulation`` ``add``, also added to the input of attention in
every block. Routers that read the noise level alone choose the same experts for every observation.

Shapes: B batch, T actions of a chunk, A values of an action, M observation tokens, C values of an
observation, D width, N = 1 + goal + M + T tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.backbones.base import BACKBONES, TOLD_BY_DENOISERS, BackboneOutput, BackbonePart
from coterie.backbones.conditioning import embed_condition
from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.core.batch import Source
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.experts.routers.config import within
from coterie.nn.embed import LabelEmbedding

POLICY_TRUNK = TrunkConfig(
    width=64,
    depth=3,
    heads=4,
    mlp="swiglu",
    modulation="add",
    residual="normalised",
    norm="rms",
    causal=True,
    qk_norm=True,
    init_std=0.02,
)


@BACKBONES.register
class PolicyConfig(BackbonePart):
    """A policy that denoises a chunk of actions."""

    kind: Literal["policy"] = "policy"
    told: ClassVar[frozenset[str]] = TOLD_BY_DENOISERS
    horizon: int = Field(8, ge=1)  # T, actions per chunk
    action_size: int = Field(2, ge=1)  # A, values of an action
    num_classes: int = Field(4, ge=0)  # number of goals; 0: none
    observations: int = Field(1, ge=0)  # M, observation tokens in ``cond.tokens``
    observation_size: int = Field(4, ge=1)  # C, values of an observation
    trunk: TrunkConfig = POLICY_TRUNK  # the transformer blocks and their expert slots

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        within("trunk", lambda: self.trunk.check_grid(None))
        self.check_told(self.told)
        return self

    @property
    def tokens(self) -> int:
        return 1 + bool(self.num_classes) + self.observations + self.horizon

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.horizon, self.action_size

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return self.observations, self.observation_size

    def check_source(self, source: Source) -> None:
        """ConfigError if the data's observations have another shape."""
        given = getattr(source, "observation", None)
        if self.observations and given is not None and tuple(given) != self.observation_shape:
            hint = f"source {source.name!r} has observations of shape {tuple(given)}"
            raise ConfigError(describe("observations", self.observation_shape, str(given), hint))

    def build(self) -> Policy:
        return Policy(self)


class NoiseToken(nn.Module):
    """``W2 (w1 s + b1)`` of s = time input / 1000, which is ln(sigma) / 4 under ``ve``.
    [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(1, width)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, value_B: Tensor) -> Tensor:
        scaled_B1 = (value_B[:, None] / 1000.0).to(self.inner.weight.dtype)
        token: Tensor = self.outer(self.inner(scaled_B1))
        return token


class Policy(nn.Module):
    """``forward(x [B, T, A], ctx, cond) -> BackboneOutput`` with a sample of x's shape.

    Learned positions: row 0 is the goal's, row 1 + j that of action j; observations have row 1,
    that of the first action; the noise token has none.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.noise = NoiseToken(width)
        self.goal = LabelEmbedding(config.num_classes, width) if config.num_classes else None
        seen = config.observations > 0
        self.observation_in = nn.Linear(config.observation_size, width) if seen else None
        self.action_in = nn.Linear(config.action_size, width)
        self.positions = nn.Parameter(torch.empty(1 + config.horizon, width))
        self.trunk = Trunk(config.trunk, config.tokens)
        self.head_norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.action_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings keep torch's own rule: two maps of N(0, 0.02) would show routers nothing."""
        self.trunk.reset_parameters()
        nn.init.normal_(self.positions, std=0.02)
        if self.goal is not None:
            self.goal.reset_parameters()
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape}]"))
        ctx = self.embed(ctx, cond)
        assert ctx.embedding is not None
        parts = [ctx.embedding[:, None]]
        if self.goal is not None:
            parts.append(self._goal(cond, len(x))[:, None] + self.positions[0])
        if self.observation_in is not None:
            parts.append(self.observation_in(self._seen(cond, x)) + self.positions[1])
        parts.append(self.action_in(x) + self.positions[1:])
        z_BND, routings = self.trunk(torch.cat(parts, dim=1), ctx)
        sample = self.head(self.head_norm(z_BND[:, -self.config.horizon :]))
        return BackboneOutput(sample, routings)

    @property
    def embeds_label(self) -> bool:
        return False  # goals are tokens

    def embed(self, ctx: Context, cond: Condition) -> Context:
        """The Context of the blocks; it does not depend on x."""
        return embed_condition(ctx, cond, self.noise, None, self.config.tokens)

    def _goal(self, cond: Condition, batch: int) -> Tensor:
        shape = None if cond.label is None else tuple(cond.label.shape)
        if cond.label is None or shape != (batch,):
            raise DataError(describe("cond.label", shape, f"goals [B], B = {batch}"))
        assert self.goal is not None
        token: Tensor = self.goal(cond.label)
        return token

    def _seen(self, cond: Condition, x: Tensor) -> Tensor:
        wanted = (len(x), *self.config.observation_shape)
        shape = None if cond.tokens is None else tuple(cond.tokens.shape)
        if cond.tokens is None or shape != wanted:
            raise DataError(describe("cond.tokens", shape, f"observations {wanted}"))
        return cond.tokens.to(x.dtype)
