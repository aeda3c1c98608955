"""U-Net: diffusers' ``UNet2DModel`` as a backbone, its convolutions as expert slots.

Convolutional denoisers as in DDPM (arXiv:2006.11239) and ADM (arXiv:2105.05233); experts in them as
in CondConv (arXiv:1904.04971). Needs the extra ``interop``.
Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from coterie.backbones import unet_layers
from coterie.backbones.base import (
    BACKBONES,
    TOLD_BY_DENOISERS,
    BackboneOutput,
    BackbonePart,
)
from coterie.backbones.conditioning import embed_condition, label_tokens
from coterie.backbones.hosting import NetworkHost, check_slot, zero
from coterie.backbones.scope import Call, scope
from coterie.backbones.slots import SlotConfig
from coterie.backbones.taps import Layers, Topology, scoped
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.numbers import Few
from coterie.core.prediction import Condition
from coterie.experts.routers.config import within
from coterie.nn.embed import LabelEmbedding


@BACKBONES.register
class UNetConfig(BackbonePart):
    """A convolutional U-Net of diffusers, with experts in its convolutions."""

    kind: Literal["unet"] = "unet"
    told: ClassVar[frozenset[str]] = TOLD_BY_DENOISERS
    image_size: PositiveInt = 28  # side of the square image in pixels
    channels: PositiveInt = 1  # of the image
    num_classes: NonNegativeInt = 10  # 0: unconditional
    widths: tuple[PositiveInt, ...] = Field((32, 64, 64), min_length=1)
    """channels of each level, from full resolution down; each halves the side"""
    layers: Few = 1  # residual blocks per level on the way down (one more on the way up)
    attention: tuple[NonNegativeInt, ...] = ()
    """levels with self-attention; the middle always has it"""
    head_width: PositiveInt = 8  # channels of an attention head
    groups: PositiveInt = 8  # groups of the group norms
    learned_variance: bool = False  # also predict a variance (twice the output channels)
    slots: tuple[SlotConfig, ...] = ()
    """Expert layers in convolutions, named by their paths in the network, such as
    ``mid_block.*.conv1`` or ``down_blocks.1.resnets.0.conv2``."""

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        factor = 2 ** (len(self.widths) - 1)
        if self.image_size % factor:
            hint = f"{len(self.widths)} levels halve the side {len(self.widths) - 1} times"
            allowed = f"a multiple of {factor}"
            raise ConfigError(describe("image_size", self.image_size, allowed, hint))
        for level in self.attention:
            if level >= len(self.widths):
                raise ConfigError(describe("attention", level, f"0..{len(self.widths) - 1}"))
        for level, width in enumerate(self.widths):
            if width % self.groups:
                allowed = f"multiples of groups = {self.groups}"
                raise ConfigError(describe(f"widths.{level}", width, allowed))
            attends = level in self.attention or level == len(self.widths) - 1
            if attends and width % self.head_width:
                allowed = f"a divisor of widths.{level} = {width}"
                raise ConfigError(describe("head_width", self.head_width, allowed))
        for index, slot in enumerate(self.slots):
            if slot.slot != "conv":
                hint = "a U-Net of images has convolutions, and no feed-forward networks"
                raise ConfigError(describe(f"slots.{index}.slot", slot.slot, "conv", hint))
            within(f"slots.{index}", partial(check_slot, slot))
            for width in self.widths:
                within(f"slots.{index}.expert", partial(slot.expert.check, width))
        self.check_told(self.told)
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.channels, self.image_size, self.image_size

    def build_network(self) -> Any:
        """The network of diffusers; ConfigError if the library is missing."""
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            hint = "pip install 'coterie[interop]'"
            raise ConfigError(f"backbone unet needs diffusers ({error}); {hint}") from None
        levels = range(len(self.widths))
        down = [f"{'Attn' if i in self.attention else ''}DownBlock2D" for i in levels]
        up = [f"{'Attn' if i in self.attention else ''}UpBlock2D" for i in levels]
        return UNet2DModel(
            sample_size=self.image_size,
            in_channels=self.channels,
            out_channels=self.channels * (2 if self.learned_variance else 1),
            down_block_types=tuple(down),
            up_block_types=tuple(reversed(up)),
            block_out_channels=self.widths,
            layers_per_block=self.layers,
            attention_head_dim=self.head_width,
            norm_num_groups=self.groups,
        )

    def build(self) -> UNet:
        return UNet(self)

    def multiply_adds(self) -> int:
        """Multiply-adds of one sample's forward pass, from shapes. Experts cost the sum of their
        kernels."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), torch.no_grad():
            network, whole = self.build_network(), self.build()
            with FlopCounterMode(display=False) as counted:
                network(torch.empty(1, *self.sample_shape), torch.zeros(1))
        kernels = sum(p.numel() for slot in whole.slots() for p in slot.experts.pool.parameters())
        return counted.get_total_flops() // 2 + kernels


class UNet(NetworkHost):
    """``forward(x [B, C, H, W], ctx, cond) -> BackboneOutput`` with a sample of x's shape."""

    def __init__(self, config: UNetConfig) -> None:
        network = config.build_network()
        width = network.time_embedding.linear_2.out_features
        if config.num_classes:
            network.class_embedding = LabelEmbedding(config.num_classes, width)
            network.class_embedding.reset_parameters()
        reset(network)
        super().__init__(network, config.slots, width)
        self.config = config

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        network: Any = self.network
        ctx = self._told(x, ctx, cond)
        given = {"class_labels": cond.label} if network.class_embedding is not None else {}
        with scope(ctx) as call:
            (out,) = network(x, ctx.time_input, **given, return_dict=False)
        return self._answer(out, call)

    def topology(self) -> Topology:
        """See :mod:`.unet_layers`."""
        network: Any = self.network
        width = network.time_embedding.linear_2.out_features
        return Topology(
            unet_layers.points(network), width, 0 if network.class_embedding is None else width
        )

    def layers(self, x: Tensor, ctx: Context, cond: Condition) -> Layers[BackboneOutput]:
        """:meth:`forward` layer by layer; see :mod:`.taps`."""
        network: Any = self.network
        ctx = self._told(x, ctx, cond)
        assert ctx.embedding is not None
        shown = label_tokens(network.class_embedding, cond)
        told = unet_layers.Told(ctx.embedding, ctx, shown=shown)
        call = Call(ctx)
        out = yield from scoped(call, unet_layers.layers(network, x, told))
        return self._answer(out, call)

    def _told(self, x: Tensor, ctx: Context, cond: Condition) -> Context:
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape}]"))
        network: Any = self.network
        label = network.class_embedding
        return embed_condition(ctx, cond, self._embed_time, label, x.shape[2] * x.shape[3])

    def _answer(self, out: Tensor, call: Call) -> BackboneOutput:
        sample, variance = out.chunk(2, dim=1) if self.config.learned_variance else (out, None)
        return BackboneOutput(sample, tuple(call.routings), variance)

    def _embed_time(self, time: Tensor) -> Tensor:
        """tau(t) [B, D], as the network itself makes it."""
        network: Any = self.network
        tau: Tensor = network.time_embedding(network.time_proj(time).to(network.dtype))
        return tau


@torch.no_grad()
def reset(network: Any) -> None:
    """Every residual branch and the output start at zero: the answer is exactly 0 (ADM)."""
    for module in network.modules():
        if type(module).__name__ == "ResnetBlock2D":
            zero(module.conv2)
        elif type(module).__name__ == "Attention":
            zero(module.to_out[0])
    zero(network.conv_out)
