"""DiT: a transformer over image patches (Peebles & Xie, arXiv:2212.09748).

Shapes: B batch, C channels, H x W pixels, P patch, N = HW / P^2 tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.backbones.adaptive import HEAD, AdaptiveLinear, adaptive
from coterie.backbones.base import (
    BACKBONES,
    TOLD_BY_DENOISERS,
    BackboneOutput,
    BackbonePart,
)
from coterie.backbones.conditioning import embed_condition, label_tokens
from coterie.backbones.references import ReferenceConfig, ReferenceStem
from coterie.backbones.taps import Layers, Point, Tap, Topology
from coterie.backbones.trunk import Trunk, TrunkConfig, modulate, router_states
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.experts.routers.config import within
from coterie.nn.embed import LabelEmbedding, TimeEmbedding, sincos_grid
from coterie.nn.init import zero_linear
from coterie.nn.patches import patchify


@BACKBONES.register
class DiTConfig(BackbonePart):
    """DiT: a transformer over image patches (arXiv:2212.09748)."""

    kind: Literal["dit"] = "dit"
    told: ClassVar[frozenset[str]] = TOLD_BY_DENOISERS
    image_size: int = Field(28, ge=1)  # side of the square image in pixels, or of the latent
    channels: int = Field(1, ge=1)  # of the image
    patch: int = Field(7, ge=1)  # side of a patch in pixels; divides image_size
    num_classes: int = Field(10, ge=0)  # 0: unconditional
    learned_variance: bool = False  # also predict a variance (twice the output channels)
    references: ReferenceConfig | None = None  # let the image attend to reference images
    trunk: TrunkConfig = TrunkConfig()  # the transformer blocks and their expert slots

    @model_validator(mode="after")
    def _check(self) -> DiTConfig:
        if self.image_size % self.patch:
            allowed = f"a divisor of image_size = {self.image_size}"
            raise ConfigError(describe("patch", self.patch, allowed))
        within("trunk", lambda: self.trunk.check_grid(self.grid))
        self.check_told(self.told)
        if self.references is not None:
            self._check_references()
        return self

    def _check_references(self) -> None:
        assert self.references is not None
        self.references.sized(self.image_size, self.channels, self.patch)
        trunk = self.trunk
        for field, value in (("causal", trunk.causal), ("rotary", trunk.rotary)):
            if value:
                hint = "references lie on no line with the image's tokens"
                raise ConfigError(describe(f"trunk.{field}", value, "false", hint))
        if trunk.window is not None:
            hint = "every token attends to the references"
            raise ConfigError(describe("trunk.window", trunk.window, "null", hint))
        self.check_told({"task"}, "a reference")

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch
        return side, side

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.channels, self.image_size, self.image_size

    def build(self) -> DiT:
        return DiT(self)


class PatchEncoder(nn.Module):
    """A DiT without its head: patches, time and label through the trunk."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.patch_in = nn.Linear(config.channels * config.patch**2, width)
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(config.num_classes, width) if config.num_classes else None
        self.trunk = Trunk(config.trunk, config.tokens, config.grid)
        self.references = None
        if config.references is not None:
            sized = config.references.sized(config.image_size, config.channels, config.patch)
            self.references = ReferenceStem(sized, config.patch, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = AdaptiveLinear(width, width, HEAD)
        self.register_buffer("positions", sincos_grid(config.grid, width), persistent=False)

    def reset_parameters(self) -> None:
        """Initialise with adaLN at zero, so that every block is the identity."""
        self.trunk.reset_parameters()
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        self.time.reset_parameters()
        if self.label is not None:
            self.label.reset_parameters()
        if self.references is not None:
            self.references.reset_parameters()
        zero_linear(self.head_modulation)

    @property
    def has_references(self) -> bool:
        return self.references is not None

    def prepare(self, cond: Condition) -> Condition:
        """``cond`` with ``keys_values`` computed from its references."""
        if self.references is None or cond.references is None:
            return cond
        z_MLD, ctx = self.references(cond)
        made = self.trunk.keys_values(z_MLD, ctx)
        batch, count = cond.references.shape[:2]
        keys_values = made.unflatten(0, (batch, count)).movedim(1, 3).flatten(3, 4)
        mask = self.references.mask(cond)
        return cond.replace(
            references=None, reference_kinds=None, keys_values=keys_values, keys_mask=mask
        )

    def encode(
        self, x: Tensor, ctx: Context, cond: Condition
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """x [B, C, H, W] -> normalised, modulated tokens [B, N, D], ready for a head."""
        z_BND, ctx = self._embed(x, ctx, cond)
        z_BND, routings = self.trunk(z_BND, ctx)
        return self._normalised(z_BND, ctx), routings

    def _embed(self, x: Tensor, ctx: Context, cond: Condition) -> tuple[Tensor, Context]:
        """Tokens [B, N, D] of the patches, and what the blocks are told."""
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape}]"))
        ctx = self.embed(ctx, cond)
        return self.patch_in(self._patchify(x)) + self.get_buffer("positions"), ctx

    @property
    def embeds_label(self) -> bool:
        return self.label is not None

    def embed(self, ctx: Context, cond: Condition) -> Context:
        """The Context of the blocks; it does not depend on x."""
        ctx = embed_condition(ctx, cond, self.time, self.label, self.config.tokens)
        if self.references is None:
            return ctx
        cond = self.prepare(cond)
        return ctx.replace(keys_values=cond.keys_values, keys_mask=cond.keys_mask)

    def _normalised(self, z_BND: Tensor, ctx: Context) -> Tensor:
        return modulate(self.head_norm(z_BND), *adaptive(self.head_modulation, ctx, HEAD))

    def _patchify(self, x: Tensor) -> Tensor:
        return patchify(x, self.config.patch)


class DiT(PatchEncoder):
    """DiT: ``forward(x [B, C, H, W], ctx, cond) -> BackboneOutput`` with a sample of x's shape."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        values = config.channels * config.patch**2
        self.head = nn.Linear(config.trunk.width, values * (2 if config.learned_variance else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """adaLN and head start at zero: the output is exactly 0, every block the identity."""
        super().reset_parameters()
        zero_linear(self.head)

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        z_BND, routings = self.encode(x, ctx, cond)
        sample, variance = self._unpatchify(self.head(z_BND))
        return BackboneOutput(sample, routings, variance)

    def topology(self) -> Topology:
        """Points after the patch embedding, after every block, and after the head."""
        width, grid = self.config.trunk.width, self.config.grid
        blocks = [Point(f"block.{layer}", width, grid) for layer in range(len(self.trunk.blocks))]
        head = Point("head", self.head.out_features, grid)
        label_width = 0 if self.label is None else width
        return Topology((Point("patch_in", width, grid), *blocks, head), width, label_width)

    def layers(self, x: Tensor, ctx: Context, cond: Condition) -> Layers[BackboneOutput]:
        """:meth:`forward` layer by layer; see :mod:`.taps`."""
        z_BND, ctx = self._embed(x, ctx, cond)
        tokens = label_tokens(self.label, cond)
        z_BND = yield Tap("patch_in", z_BND, ctx, tokens)
        routings: list[Routing] = []
        states: dict[str, Tensor] = {}
        for layer, block in enumerate(self.trunk.blocks):
            z_BND, made = block(z_BND, ctx.replace(layer=layer), states)
            states = states | router_states(made)
            routings.extend(made)
            z_BND = yield Tap(f"block.{layer}", z_BND, ctx, tokens)
        out = yield Tap("head", self.head(self._normalised(z_BND, ctx)), ctx, tokens)
        sample, variance = self._unpatchify(out)
        return BackboneOutput(sample, tuple(routings), variance)

    def _unpatchify(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        B = out.shape[0]
        P, (rows, columns) = self.config.patch, self.config.grid
        parts = 2 if self.config.learned_variance else 1
        C = self.config.channels
        out = out.reshape(B, rows, columns, parts, C, P, P).permute(3, 0, 4, 1, 5, 2, 6)
        out = out.reshape(parts, B, C, rows * P, columns * P)
        return out[0], out[1] if parts == 2 else None
