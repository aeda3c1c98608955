"""The transformer trunk: blocks of attention and feed-forward network with expert slots.

One trunk serves images (adaLN-zero, bidirectional) and text (RMSNorm, causal). It has two kinds of
slots for expert layers:

* ``ffn``: the layer replaces the feed-forward network; its input is normalised and modulated.
* ``pre_block``: the layer returns y and the block reads ``m * z`` with ``m = 1 + y``. What the
  block adds is not masked: ``z_out = z + dAttn(m z) + dMLP(m z + dAttn)`` (DTR, Switch-DiT).

Every slot gets the same :class:`Context`. Pools that several layers share (ReXMoE) and cells of
recurrent routers (RMoE) belong to the host (:mod:`.slots`). Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from coterie.backbones.adaptive import BLOCK, AdaptiveLinear, adaptive
from coterie.backbones.checks import check_slots
from coterie.backbones.slots import ExpertHost, Layers, Site, SlotConfig, sites
from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, ExpertOutput
from coterie.experts.dense import FEED_FORWARD
from coterie.nn.attention import Memory, SelfAttention
from coterie.nn.init import normal_linear, xavier_linear, zero_linear
from coterie.nn.windows import Windows


class TrunkConfig(Config):
    """Sizes and style of a stack of transformer blocks, and their expert slots."""

    width: int = Field(96, ge=1)  # D, size of a token
    depth: int = Field(4, ge=1, le=1024)  # number of blocks
    heads: int = Field(4, ge=1)  # attention heads
    kv_heads: int | None = Field(None, ge=1)  # key and value heads; null: as many as heads
    head_width: int | None = Field(None, ge=1)  # size of a head; null: width / heads
    dropout: float = Field(0.0, ge=0.0, lt=1.0)  # probability, on the output of attention
    mlp: Literal["gelu", "swiglu"] = "gelu"  # feed-forward network
    mlp_hidden: int | None = Field(None, ge=1)  # its inner size; null: 4 * width
    modulation: Literal["adaln_zero", "add", "none"] = "adaln_zero"
    """Conditioning on noise level and label: adaLN-zero (DiT), ``add`` to the input of attention
    (MoDE), or none."""
    residual: Literal["stream", "normalised"] = "stream"
    """``normalised``: the normalised input of the feed-forward network replaces the stream before
    its output is added (MoDE's released code)."""
    norm: Literal["layer", "rms"] = "layer"  # layer norm or RMS norm
    norm_eps: PositiveFloat = 1e-6  # added to the variance in the norms
    causal: bool = False  # a token attends to earlier tokens only
    rotary: bool = False  # rotary position embedding
    qkv_bias: bool = True  # biases in the query, key and value maps
    qk_norm: bool = False  # normalise queries and keys
    window: PositiveInt | None = None
    """side of attention windows on the token grid; null: full attention"""
    window_layers: Layers = "all"  # blocks with windows
    init_std: NonNegativeFloat | None = None
    """Standard deviation of initial weight matrices, also of experts and routers that set none;
    null: Xavier uniform (DiT), experts and routers by their own rules."""
    slots: tuple[SlotConfig, ...] = ()  # expert layers in the blocks

    @model_validator(mode="after")
    def _check(self) -> TrunkConfig:
        if self.head_width is None and self.width % self.heads:
            allowed = f"a divisor of width = {self.width}"
            raise ConfigError(describe("heads", self.heads, allowed))
        if self.heads % (self.kv_heads or self.heads):
            allowed = f"a divisor of heads = {self.heads}"
            raise ConfigError(describe("kv_heads", self.kv_heads, allowed))
        if self.rotary and (self.head_width or self.width // self.heads) % 2:
            allowed = f"a number that leaves an even head width, width = {self.width}"
            raise ConfigError(describe("heads", self.heads, allowed, "rotary turns channel pairs"))
        if self.residual == "normalised" and self.modulation == "adaln_zero":
            hint = "adaLN-zero blocks begin as the identity"
            raise ConfigError(describe("residual", self.residual, "stream", hint))
        self._check_windows()
        check_slots(self.slots, self.width, self.depth, self.causal, self.modulation)
        return self

    def _check_windows(self) -> None:
        if self.window is not None and (self.causal or self.rotary):
            hint = "causal and rotary attention follow one line of tokens"
            raise ConfigError(describe("window", self.window, "null", hint))
        windowed = sites(self.window_layers, self.depth)
        if not windowed:
            allowed = f"one or more of {list(range(self.depth))}"
            raise ConfigError(describe("window_layers", self.window_layers, allowed))
        for layer in windowed:
            if not 0 <= layer < self.depth:
                allowed = f"blocks 0..{self.depth - 1}"
                raise ConfigError(describe("window_layers", layer, allowed))

    def windows(self, layer: int, grid: tuple[int, ...] | None) -> Windows | None:
        """The windows of block ``layer``; None: full attention. ConfigError if they do not fit the
        grid."""
        if self.window is None or layer not in sites(self.window_layers, self.depth):
            return None
        if grid is None:
            hint = "the tokens of this backbone lie on no grid"
            raise ConfigError(describe("window", self.window, "null", hint))
        return Windows(grid, self.window)

    def check_grid(self, grid: tuple[int, ...] | None) -> None:
        """ConfigError if windows do not fit the grid of a backbone's tokens."""
        for layer in range(self.depth):
            self.windows(layer, grid)

    @property
    def hidden(self) -> int:
        """Inner size of the feed-forward network."""
        return self.mlp_hidden or 4 * self.width


def _norm(config: TrunkConfig) -> nn.Module:
    affine = config.modulation != "adaln_zero"
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.norm_eps, elementwise_affine=affine)
    return nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=affine)


def modulate(x_BND: Tensor, shift_B1D: Tensor, factor_B1D: Tensor) -> Tensor:
    """``x * factor + shift``; ``factor`` is 1 + scale."""
    return torch.addcmul(shift_B1D, x_BND, factor_B1D)


def router_states(routings: Iterable[Routing]) -> dict[str, Tensor]:
    """States of a block's recurrent routers for the next block, by slot."""
    return {made.slot: made.state for made in routings if made.state is not None}


class Block(nn.Module):
    """Attention and feed-forward network with optional experts in its slots."""

    def __init__(
        self,
        config: TrunkConfig,
        length: int,
        experts: dict[str, ExpertLayer],
        residual: bool,
        windows: Windows | None,
        condition_width: int,
    ) -> None:
        super().__init__()
        width = config.width
        self.residual = residual
        self.replaced = config.residual == "normalised"
        self.added = config.modulation == "add"
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attention = SelfAttention(
            width,
            config.heads,
            config.qkv_bias,
            config.qk_norm,
            config.causal,
            length if config.rotary else 0,
            windows,
            config.kv_heads,
            config.head_width,
            config.dropout,
        )
        self.pre_block = experts.get("pre_block")
        reads = {slot: layer.config.router_reads for slot, layer in experts.items()}
        self.shown = {slot for slot, kind in reads.items() if kind == "normalised"}
        self.ffn: nn.Module = (
            experts["ffn"] if "ffn" in experts else FEED_FORWARD[config.mlp](width, config.hidden)
        )
        adapted = config.modulation == "adaln_zero"
        self.modulation = AdaptiveLinear(condition_width, width, BLOCK) if adapted else None

    def forward(
        self, z_BND: Tensor, ctx: Context, states: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """z [B, N, D] after the block. ``states``: router state by slot, from the layers before; it
        is not changed, so that a block may be run again."""
        states = {} if states is None else states
        routings: list[Routing] = []
        shift1, factor1, gate1, shift2, factor2, gate2 = self._modulation(ctx)
        u_BND, h_BND = self._read(z_BND, ctx, states, routings, shift1, factor1)
        attended_BND = self.attention(h_BND, ctx.token_mask, self._memory(ctx))
        stream_BND = self._add(u_BND, attended_BND, gate1)
        kept_BND = stream_BND if u_BND is z_BND else self._add(z_BND, attended_BND, gate1)
        del attended_BND  # not kept while the feed-forward network needs its memory
        normal_BND = self.norm2(stream_BND)
        h_BND = self._modulate(normal_BND, shift2, factor2)
        if isinstance(self.ffn, ExpertLayer):
            own = ctx.replace(slot="ffn", stream=stream_BND, state=states.get("ffn"))
            if "ffn" in self.shown:
                own = own.replace(normalised=normal_BND)
            answer: ExpertOutput = self.ffn(h_BND, own)
            routings.extend(answer.routings)
            y_BND = answer.y
        else:
            y_BND = self.ffn(h_BND)
        if not self.residual:
            return y_BND, routings
        return self._add(h_BND if self.replaced else kept_BND, y_BND, gate2), routings

    def keys_values(self, z_BND: Tensor, ctx: Context) -> Tensor:
        """[B, 2, N, G*d]: keys and values of these tokens, for others to attend to."""
        shift, factor, *_ = self._modulation(ctx)
        _, h_BND = self._read(z_BND, ctx, {}, [], shift, factor)
        return self.attention.keys_values(h_BND)

    def _read(
        self,
        z_BND: Tensor,
        ctx: Context,
        states: Mapping[str, Tensor],
        routings: list[Routing],
        shift_B1D: Tensor | None,
        factor_B1D: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream as the block reads it, and as its attention does."""
        u_BND = z_BND
        if self.pre_block is not None:
            own = ctx.replace(slot="pre_block", stream=z_BND, state=states.get("pre_block"))
            if "pre_block" in self.shown:
                own = own.replace(normalised=self.norm1(z_BND))
            answer: ExpertOutput = self.pre_block(z_BND, own)
            routings.extend(answer.routings)
            u_BND = (1 + answer.y) * z_BND
        h_BND = self._modulate(self.norm1(u_BND), shift_B1D, factor_B1D)
        if self.added:
            assert ctx.embedding is not None
            h_BND = h_BND + ctx.embedding[:, None]
        return u_BND, h_BND

    @staticmethod
    def _memory(ctx: Context) -> Memory | None:
        if ctx.keys_values is None:
            return None
        return Memory(ctx.keys_values[:, :, ctx.layer], ctx.keys_mask)

    def _modulation(self, ctx: Context) -> Sequence[Tensor | None]:
        if self.modulation is None:
            return (None,) * 6
        return adaptive(self.modulation, ctx, BLOCK)

    @staticmethod
    def _modulate(x_BND: Tensor, shift_B1D: Tensor | None, factor_B1D: Tensor | None) -> Tensor:
        if shift_B1D is None or factor_B1D is None:
            return x_BND
        return modulate(x_BND, shift_B1D, factor_B1D)

    @staticmethod
    def _add(x_BND: Tensor, y_BND: Tensor, gate_B1D: Tensor | None) -> Tensor:
        """x + gate y."""
        return x_BND + y_BND if gate_B1D is None else torch.addcmul(x_BND, gate_B1D, y_BND)


class Trunk(ExpertHost):
    """A stack of blocks. ``forward(z, ctx) -> (z, routings)``, z [B, N, D].

    ``grid``: the ``length`` tokens' grid, row-major, for windows. ``condition_width``: size of
    ``ctx.embedding``, if not D.
    """

    def __init__(
        self,
        config: TrunkConfig,
        length: int,
        grid: tuple[int, ...] | None = None,
        condition_width: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        by_block: list[dict[str, ExpertLayer]] = [{} for _ in range(config.depth)]
        for slot in config.slots:
            places = [
                Site(layer, slot.expert, config.width, config.width, init_std=config.init_std)
                for layer in slot.sites(config.depth)
            ]
            for layer, made in self.build_system(slot, places).items():
                by_block[layer][slot.slot] = made
        replaced = {i for s in config.slots if not s.residual for i in s.sites(config.depth)}
        width = condition_width or config.width
        if config.modulation == "add" and width != config.width:
            hint = f"the condition's embedding has {width} channels, the stream {config.width}"
            raise ConfigError(describe("modulation", "add", "adaln_zero or none", hint))
        self.blocks = nn.ModuleList(
            Block(config, length, experts, i not in replaced, config.windows(i, grid), width)
            for i, experts in enumerate(by_block)
        )

    def expert_layer(self, slot: str, layer: int) -> ExpertLayer:
        found: ExpertLayer = getattr(self.blocks[layer], slot)
        return found

    def reset_parameters(self) -> None:
        """Initialise blocks, then adaLN at zero, then every expert layer by its own
        configuration."""
        if self.config.init_std is None:
            xavier_linear(self)
        else:
            normal_linear(self, self.config.init_std)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.modulation is not None:
                zero_linear(block.modulation)
        self.reset_experts()

    def forward(self, z_BND: Tensor, ctx: Context) -> tuple[Tensor, tuple[Routing, ...]]:
        routings: list[Routing] = []
        states: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            z_BND, made = block(z_BND, ctx.replace(layer=layer), states)
            states = states | router_states(made)
            routings.extend(made)
        return z_BND, tuple(routings)

    def keys_values(self, z_BND: Tensor, ctx: Context) -> Tensor:
        """[B, 2, layers, N, G*d]: keys and values of tokens that attend to each other only, for the
        Context's ``keys_values``. Routings of this pass are dropped."""
        states: dict[str, Tensor] = {}
        made = []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            own = ctx.replace(layer=layer)
            made.append(block.keys_values(z_BND, own))
            if layer + 1 < len(self.blocks):
                z_BND, routings = block(z_BND, own, states)
                states = states | router_states(routings)
        return torch.stack(made, dim=2)
