"""A transformer over the voxels of a point cloud that can train on a few of its tokens (DiT-3D,
arXiv:2307.01831; FastDiT-3D, arXiv:2312.07231; MaskDiT, arXiv:2306.09305).

Noisy points -> voxels -> patches. In training the encoder, which has the experts, sees only some
patches; a light decoder sees the whole grid, with a learned token for each dropped patch. Trilinear
interpolation maps its output back to the points. Sampling drops nothing.

Shapes: B batch, P points, V cells per axis, S patch side, G = V / S, L = G^3 tokens, K tokens that
the encoder sees, D width.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from coterie.backbones.adaptive import HEAD, AdaptiveLinear, adaptive
from coterie.backbones.base import (
    BACKBONES,
    TOLD_BY_DENOISERS,
    BackboneOutput,
    BackbonePart,
)
from coterie.backbones.conditioning import embed_condition
from coterie.backbones.trunk import Trunk, TrunkConfig, modulate
from coterie.backbones.voxels import Voxels, check_clouds, devoxelise, voxelise
from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.core.share import uniform
from coterie.experts.routers.config import within
from coterie.nn.embed import LabelEmbedding, TimeEmbedding, sincos_grid
from coterie.nn.init import xavier_linear, zero_linear
from coterie.nn.subset import draw_subset, keep_tokens, restore_tokens, subset_mask
from coterie.nn.windows import Windows


class MaskConfig(Config):
    """Which patches the encoder does not see in training, drawn anew in every step.

    Of n patches ``max(1, round((1 - r) n))`` stay.
    """

    kind: Literal["none", "random", "fgbg"] = "none"
    """``random`` drops the share ``r`` of all patches; ``fgbg`` drops ``rf`` of the foreground
    (patches that contain a point of the noisy input) and ``rb`` of the background."""
    r: float = Field(0.9, ge=0, le=1)  # share of all patches that is dropped
    rf: float = Field(0.95, ge=0, le=1)  # share of foreground patches that is dropped
    rb: float = Field(0.99, ge=0, le=1)  # share of background patches that is dropped
    until: float = Field(1.0, ge=0, le=1)  # share of training after which nothing is dropped

    def draw(self, foreground_BL: Tensor, ctx: Context) -> Tensor | None:
        """Ids of the patches that stay, i64 [B, K], padded with L; None: all stay.

        Each sample keeps its own exact number, so its result does not depend on the other samples.
        """
        if self.kind == "none" or ctx.progress > self.until:
            return None
        rng = ctx.drawing("visible")
        if rng is None:
            return None
        scores = uniform(foreground_BL.shape, rng)
        aware = self.kind == "fgbg"
        groups = (foreground_BL if aware else torch.zeros_like(foreground_BL)).long()
        drop = (self.rb, self.rf) if aware else (self.r,)
        return draw_subset(scores.to(groups.device), groups, drop)


ENCODER = TrunkConfig(width=64, depth=4, heads=4)
DECODER = TrunkConfig(width=64, depth=2, heads=4, window=4, window_layers=(1,))


@BACKBONES.register
class PointsConfig(BackbonePart):
    """A transformer over point clouds."""

    kind: Literal["points"] = "points"
    told: ClassVar[frozenset[str]] = TOLD_BY_DENOISERS
    num_points: int = Field(512, ge=2)  # points of a cloud
    voxels: int = Field(16, ge=2)  # cells per axis
    patch: int = Field(2, ge=1)  # side of a patch in cells
    num_classes: int = Field(3, ge=0)  # 0: unconditional
    mask: MaskConfig = MaskConfig()  # patches dropped in training
    trunk: TrunkConfig = ENCODER  # encoder blocks and their expert slots
    decoder: TrunkConfig = DECODER  # decoder blocks, over the whole grid

    @model_validator(mode="after")
    def _check(self) -> PointsConfig:
        if self.voxels % self.patch:
            allowed = f"a divisor of voxels = {self.voxels}"
            raise ConfigError(describe("patch", self.patch, allowed))
        for name in ("trunk", "decoder"):
            trunk: TrunkConfig = getattr(self, name)
            if trunk.causal or trunk.rotary:
                hint = "tokens of a volume have no order; their positions are added"
                field = "causal" if trunk.causal else "rotary"
                raise ConfigError(describe(f"{name}.{field}", True, "false", hint))
        if self.trunk.window is not None:
            hint = "the encoder sees scattered tokens; windows are for the decoder"
            raise ConfigError(describe("trunk.window", self.trunk.window, "null", hint))
        if self.decoder.slots:
            hint = "experts are in the encoder: trunk.slots"
            raise ConfigError(describe("decoder.slots", len(self.decoder.slots), "none", hint))
        within("decoder", lambda: self.decoder.check_grid(self.grid))
        self.check_told(self.told)
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        side = self.voxels // self.patch
        return side, side, side

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.num_points, 3

    @property
    def patches(self) -> Windows:
        """How the grid of cells is cut into patches, in the order of the tokens."""
        return Windows((self.voxels,) * 3, self.patch)

    def foreground(self, voxels: Voxels) -> Tensor:
        """bool [B, L]: patches with a point in them."""
        cells = self.patches.split(voxels.counts[:, :, None])
        return (cells > 0).any(dim=1).view(-1, self.tokens)

    def build(self) -> PointTransformer:
        return PointTransformer(self)

    def visible_tokens(self) -> int:
        """Number of patches that the encoder sees in training, for a cloud of pure noise.

        Clouds with less noise fill about as many.
        """
        rng = Generator().manual_seed(0)
        cloud = torch.randn(1, self.num_points, 3, generator=rng)
        ctx = Context(1, self.tokens, training=True, rng=rng, progress=0.0)
        ids_BK = self.mask.draw(self.foreground(voxelise(cloud, self.voxels)), ctx)
        return self.tokens if ids_BK is None else ids_BK.shape[1]

    def multiply_adds(self) -> int:
        """Multiply-adds of one sample's forward pass in training, from parameters alone."""
        with torch.device("meta"):
            model = self.build()
        encoder, decoder = (
            sum(count_parameters(part).active for part in parts)
            for parts in (
                (model.patch_in, model.trunk),
                (model.bridge, model.decoder, model.head_modulation, model.head),
            )
        )
        return encoder * self.visible_tokens() + decoder * self.tokens


class PointTransformer(nn.Module):
    """``forward(x [B, P, 3], ctx, cond) -> BackboneOutput`` with a sample of x's shape.

    In training with a mask, ``visible`` marks the points in patches that the encoder saw.
    """

    def __init__(self, config: PointsConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.trunk.width, config.decoder.width
        values = 3 * config.patch**3
        self.patches = config.patches
        self.patch_in = nn.Linear(values, width)
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(config.num_classes, width) if config.num_classes else None
        self.trunk = Trunk(config.trunk, config.tokens)
        self.bridge_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.bridge = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(inner))
        self.decoder = Trunk(config.decoder, config.tokens, config.grid, condition_width=width)
        self.head_norm = nn.LayerNorm(inner, eps=1e-6, elementwise_affine=False)
        self.head_modulation = AdaptiveLinear(width, inner, HEAD)
        self.head = nn.Linear(inner, values)
        for name, size in (("positions", width), ("decoder_positions", inner)):
            self.register_buffer(name, sincos_grid(config.grid, size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """adaLN and head start at zero: the output is exactly 0, every block the identity."""
        self.trunk.reset_parameters()
        self.decoder.reset_parameters()
        xavier_linear(self.patch_in)
        xavier_linear(self.bridge)
        self.time.reset_parameters()
        if self.label is not None:
            self.label.reset_parameters()
        nn.init.normal_(self.mask_token, std=0.02)
        zero_linear(self.head_modulation)
        zero_linear(self.head)

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape}]"))
        check_clouds(x)
        ctx = self.embed(ctx, cond)
        voxels = voxelise(x, self.config.voxels)
        ids_BK = self.config.mask.draw(self.config.foreground(voxels), ctx)
        z_BKD, routings = self._encode(voxels, ids_BK, ctx)
        grid_BVC = self._decode(z_BKD, ids_BK, ctx)
        sample = devoxelise(grid_BVC, voxels.coordinates, self.config.voxels)
        visible = None if ids_BK is None else self._visible(voxels, ids_BK)
        return BackboneOutput(sample.to(x.dtype), routings, visible=visible)

    @property
    def embeds_label(self) -> bool:
        return self.label is not None

    def embed(self, ctx: Context, cond: Condition) -> Context:
        """The Context of the blocks; it does not depend on x."""
        return embed_condition(ctx, cond, self.time, self.label, self.config.tokens)

    def _encode(
        self, voxels: Voxels, ids_BK: Tensor | None, ctx: Context
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Tokens [B, K, D] of the visible patches; what is dropped costs nothing from here on."""
        L = self.config.tokens
        patches = self.patches.split(voxels.means).reshape(-1, L, self.patch_in.in_features)
        positions = self.get_buffer("positions").expand(len(patches), -1, -1)
        if ids_BK is not None:
            patches, positions = keep_tokens(patches, ids_BK), keep_tokens(positions, ids_BK)
            mask = subset_mask(ids_BK, L)
            ctx = ctx.replace(tokens=ids_BK.shape[1], positions=ids_BK, token_mask=mask)
        return self.trunk(self.patch_in(patches.to(self.patch_in.weight.dtype)) + positions, ctx)

    def _decode(self, z_BKD: Tensor, ids_BK: Tensor | None, ctx: Context) -> Tensor:
        """Cell values [B, V^3, 3] from what the encoder saw."""
        h = self.bridge(self.bridge_norm(z_BKD))
        if ids_BK is not None:
            h = restore_tokens(h, ids_BK, self.config.tokens, self.mask_token)
        h_BLD, _ = self.decoder(h + self.get_buffer("decoder_positions"), ctx)
        condition = adaptive(self.head_modulation, ctx, HEAD)
        out = self.head(modulate(self.head_norm(h_BLD), *condition))
        cells = out.reshape(-1, self.config.patch**3, 3)
        return self.patches.join(cells)

    def _visible(self, voxels: Voxels, ids_BK: Tensor) -> Tensor:
        """bool [B, P]."""
        B, L = len(ids_BK), self.config.tokens
        seen = torch.zeros(B, L + 1, dtype=torch.bool, device=ids_BK.device)
        seen_BL1 = seen.scatter(1, ids_BK, 1)[:, :L, None]
        cells = self.patches.join(
            seen_BL1.expand(-1, -1, self.config.patch**3).flatten(0, 1)[:, :, None]
        )
        return cells[:, :, 0].gather(1, voxels.cells)
