"""Reference images that an image attends to, for generation guided by examples.

References go through the same blocks as the image, with a patch embedding of their own; the
embedding of their kind replaces that of noise level and label (FastFit's semi-attention, 2025):

    R_i' = Attn(Q_Ri, K_Ri, V_Ri),    X' = Attn(Q_X, [K_R1 .. K_Rn, K_X], [V_R1 .. V_Rn, V_X]).

A reference attends to itself only, so its keys and values do not depend on x, t or other
references, and can be computed once.

Shapes: B batch, R references, C channels, H x W pixels, L tokens of one reference, D width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.nn.embed import LabelEmbedding, sincos_grid
from coterie.nn.patches import patchify


class ReferenceConfig(Config):
    """Reference images that the sample attends to."""

    kinds: int = Field(1, ge=1)  # number of kinds, each with an embedding
    image_size: int | None = Field(None, ge=1)  # side in pixels; null: that of the sample
    channels: int | None = Field(None, ge=1)  # null: those of the sample

    def sized(self, image_size: int, channels: int, patch: int) -> ReferenceConfig:
        """A copy with the sample's sizes filled in; ConfigError if the patch does not fit."""
        size = self.image_size or image_size
        if size % patch:
            allowed = f"a multiple of patch = {patch}"
            raise ConfigError(describe("references.image_size", size, allowed))
        return self.replace(image_size=size, channels=self.channels or channels)


class ReferenceStem(nn.Module):
    """Tokens [B*R, L, D] of a condition's references, and the Context for the blocks.

    Reads ``references [B, R, C, H, W]`` and ``reference_kinds`` i64 [B, R].
    """

    def __init__(self, config: ReferenceConfig, patch: int, width: int) -> None:
        super().__init__()
        assert config.image_size is not None and config.channels is not None
        self.config, self.patch = config, patch
        self.shape = (config.channels, config.image_size, config.image_size)
        side = config.image_size // patch
        self.tokens = side * side
        self.patch_in = nn.Linear(config.channels * patch**2, width)
        self.kind = LabelEmbedding(config.kinds, width)
        self.register_buffer("positions", sincos_grid((side, side), width), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        self.kind.reset_parameters()

    def forward(self, cond: Condition) -> tuple[Tensor, Context]:
        refs = self._checked(cond)
        B, R = refs.shape[:2]
        kinds = cond.reference_kinds
        if kinds is None:
            kinds = torch.zeros(B, R, dtype=torch.long, device=refs.device)
        rows = refs.flatten(0, 1).to(self.patch_in.weight.dtype)
        z = self.patch_in(patchify(rows, self.patch)) + self.get_buffer("positions")
        task = None if cond.task is None else cond.task.repeat_interleave(R, dim=0)
        ctx = Context(
            batch=B * R,
            tokens=self.tokens,
            embedding=self.kind(kinds.flatten()),
            task=task,
            positions=torch.arange(self.tokens, device=refs.device),
            training=self.training,
        )
        return z, ctx

    def _checked(self, cond: Condition) -> Tensor:
        refs, kinds = cond.references, cond.reference_kinds
        if refs is None or refs.dim() != 5 or refs.shape[2:] != self.shape:
            shape = None if refs is None else tuple(refs.shape)
            allowed = f"[B, R, {', '.join(str(size) for size in self.shape)}]"
            raise DataError(describe("cond.references", shape, allowed))
        if kinds is not None and kinds.shape != refs.shape[:2]:
            allowed = f"[B, R] = {tuple(refs.shape[:2])}"
            raise DataError(describe("cond.reference_kinds", tuple(kinds.shape), allowed))
        return refs

    def mask(self, cond: Condition) -> Tensor | None:
        """bool [B, R*L]: tokens of references that exist; None if all do."""
        kinds = cond.reference_kinds
        if kinds is None or bool((kinds >= 0).all()):
            return None
        return (kinds >= 0).repeat_interleave(self.tokens, dim=1)
