"""A small text transformer on the same trunk: autoregressive or bidirectional (masked diffusion).

Shapes: B batch, N positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.backbones.base import BACKBONES, BackboneOutput, BackbonePart
from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.experts.routers.config import within

TEXT_TRUNK = TrunkConfig(
    width=96,
    depth=3,
    heads=4,
    mlp="swiglu",
    mlp_hidden=256,
    modulation="none",
    norm="rms",
    causal=True,
    rotary=True,
    qkv_bias=False,
    init_std=0.02,
)


@BACKBONES.register
class CausalConfig(BackbonePart):
    """A text transformer, autoregressive or bidirectional."""

    kind: Literal["causal"] = "causal"
    answers: ClassVar[Literal["sample", "logits", "tasks"]] = "logits"
    told: ClassVar[frozenset[str]] = frozenset({"step_index", "label", "task"})
    vocabulary: int = Field(260, ge=2)
    """number of token ids; for masked diffusion with the mask token"""
    context: int = Field(128, ge=2)  # longest sequence, in tokens
    trunk: TrunkConfig = TEXT_TRUNK  # blocks; ``causal`` false for masked diffusion

    @model_validator(mode="after")
    def _check(self) -> CausalConfig:
        if self.trunk.modulation != "none":
            hint = "text has no time embedding to modulate by"
            raise ConfigError(describe("trunk.modulation", self.trunk.modulation, "none", hint))
        within("trunk", lambda: self.trunk.check_grid(None))
        self.check_told(self.told)
        return self

    @property
    def tokens(self) -> int:
        return self.context

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.context,)

    def build(self) -> CausalTransformer:
        return CausalTransformer(self)


class CausalTransformer(nn.Module):
    """A text transformer: ``forward(ids i64 [B, N], ctx, cond)``, logits f32 [B, N, V]."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.trunk = Trunk(config.trunk, config.context)
        self.head_norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 if self.config.trunk.init_std is None else self.config.trunk.init_std
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.head.weight, std=std)
        self.trunk.reset_parameters()

    def forward(self, ids_BN: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        if ids_BN.dim() != 2 or ids_BN.shape[1] > self.config.context:
            allowed = f"[B, N <= {self.config.context}]"
            raise DataError(describe("token ids", tuple(ids_BN.shape), allowed))
        B, N = ids_BN.shape
        ctx = ctx.replace(
            batch=B,
            tokens=N,
            label=cond.label,
            task=cond.task,
            token_mask=cond.tokens_mask,
            positions=torch.arange(N, device=ids_BN.device),
        )
        z_BND, routings = self.trunk(self.embedding(ids_BN), ctx)
        logits = self.head(self.head_norm(z_BND)).float()
        return BackboneOutput(logits, routings)
