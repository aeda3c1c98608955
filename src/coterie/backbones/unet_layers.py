"""U-Nets of diffusers layer by layer: ``UNet2DModel`` and ``UNet2DConditionModel``.

A layer is a residual block with the attention behind it, or a downsampling; an upsampling belongs
to the layer before it. Points, as Adaptive Feature Aggregation has them (25 in Stable Diffusion
1.5): ``conv_in``, ``down.<block>.<layer>``, ``down.<block>.down``, ``mid``, ``up.<block>.<layer>``
without the very last, ``conv_out``. A skip connection carries what came in at its point.

Found by structure: nothing of diffusers is imported. Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.backbones.taps import Layers, Point, Tap
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe

DOWN = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")
MIDDLE = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
SWITCHES = ("s1", "s2", "b1", "b2")  # of FreeU, which changes features on the way up


@dataclass(frozen=True, eq=False)
class Told:
    """Inputs of every layer in one call: embedding, condition tokens and their mask, and the
    Context."""

    embedding: Tensor
    ctx: Context
    tokens: Tensor | None = None  # [B, M, C]
    bias: Tensor | None = None  # [B, 1, M], 0 where a token may be seen
    shown: Tensor | None = None  # [B, M, C], the condition for whoever taps
    mask: Tensor | None = None  # bool [B, M], of what is shown

    def tap(self, name: str, feature: Tensor) -> Tap:
        return Tap(name, feature, self.ctx, self.shown, self.mask)


def check_blocks(network: Any) -> None:
    """ConfigError for blocks whose layers are unknown."""
    blocks: list[tuple[str, Any, tuple[str, ...]]] = [
        (f"{name}.{number}", block, known)
        for name, known in (("down_blocks", DOWN), ("up_blocks", UP))
        for number, block in _each(network, name)
    ]
    if network.mid_block is not None:
        blocks.append(("mid_block", network.mid_block, MIDDLE))
    for where, block, known in blocks:
        kind = type(block).__name__
        if kind not in known:
            raise ConfigError(
                describe(where, kind, ", ".join(known), "it runs whole, not by layers")
            )
        if any(getattr(block, name, None) for name in SWITCHES):
            raise ConfigError(describe(where, "FreeU", "FreeU switched off"))


def _each(network: Any, name: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(getattr(network, name))


def points(network: Any) -> tuple[Point, ...]:
    """The points at which a U-Net can be tapped, in running order."""
    check_blocks(network)
    out = [Point("conv_in", network.conv_in.out_channels)]
    for number, block in _each(network, "down_blocks"):
        for layer, resnet in enumerate(block.resnets):
            out.append(Point(f"down.{number}.{layer}", resnet.out_channels))
        if block.downsamplers is not None:
            out.append(Point(f"down.{number}.down", block.downsamplers[-1].out_channels))
    if network.mid_block is not None:
        out.append(Point("mid", network.mid_block.resnets[-1].out_channels))
    for number, block in _each(network, "up_blocks"):
        for layer, resnet in enumerate(block.resnets):
            out.append(Point(f"up.{number}.{layer}", resnet.out_channels))
    return (*out[:-1], Point("conv_out", network.conv_out.out_channels))


def layers(network: Any, x: Tensor, told: Told) -> Layers[Tensor]:
    """Run x [B, C, H, W] through the network layer by layer; the value is its output."""
    if network.config.center_input_sample:
        x = 2 * x - 1.0
    h = yield told.tap("conv_in", network.conv_in(x))
    skips = [h]
    for number, block in _each(network, "down_blocks"):
        for layer, (resnet, attention) in enumerate(_pairs(block)):
            h = _attend(attention, resnet(h, told.embedding), told)
            h = yield told.tap(f"down.{number}.{layer}", h)
            skips.append(h)
        if block.downsamplers is not None:
            h = yield told.tap(f"down.{number}.down", _resample(block, "down", h, told, None))
            skips.append(h)
    if network.mid_block is not None:
        h = yield told.tap("mid", _middle(network.mid_block, h, told))
    h = yield from _upwards(network, h, skips, told, x)
    if network.conv_norm_out is not None:
        h = network.conv_act(network.conv_norm_out(h))
    h = yield told.tap("conv_out", network.conv_out(h))
    return h


def _upwards(network: Any, h: Tensor, skips: list[Tensor], told: Told, x: Tensor) -> Layers[Tensor]:
    """The way up; after its last layer nothing is shown."""
    ups = sum(block.upsamplers is not None for block in network.up_blocks)
    uneven = any(side % 2**ups for side in x.shape[-2:])
    for number, block in _each(network, "up_blocks"):
        pairs = _pairs(block)
        last = number == len(network.up_blocks) - 1
        for layer, (resnet, attention) in enumerate(pairs):
            h = resnet(torch.cat([h, skips.pop()], dim=1), told.embedding)
            h = _attend(attention, h, told)
            if layer == len(pairs) - 1:
                if block.upsamplers is not None:
                    size = tuple(skips[-1].shape[2:]) if uneven and skips else None
                    h = _resample(block, "up", h, told, size)
                if last:
                    return h
            h = yield told.tap(f"up.{number}.{layer}", h)
    return h


def _pairs(block: Any) -> list[tuple[Any, Any]]:
    """Residual blocks, each with the attention behind it (None: there is none)."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))


def _attend(attention: Any, h: Tensor, told: Told) -> Tensor:
    if attention is None:
        return h
    out = attention(h, **_seen(attention, told))
    return out[0] if isinstance(out, tuple) else out


def _seen(attention: Any, told: Told) -> dict[str, Any]:
    """Arguments of an attention: transformers see the condition, plain ones their pixels only."""
    if not hasattr(attention, "transformer_blocks"):
        return {}
    return {
        "encoder_hidden_states": told.tokens,
        "encoder_attention_mask": told.bias,
        "return_dict": False,
    }


def _middle(block: Any, h: Tensor, told: Told) -> Tensor:
    h = block.resnets[0](h, told.embedding)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None and not hasattr(attention, "transformer_blocks"):
            h = attention(h, temb=told.embedding)
        else:
            h = _attend(attention, h, told)
        h = resnet(h, told.embedding)
    return h


def _resample(block: Any, way: str, h: Tensor, told: Told, size: Any) -> Tensor:
    """Through a block's down- or upsamplers; some are residual blocks, told the embedding."""
    residual = getattr(block, f"{way}sample_type", None) == "resnet"
    for sampler in getattr(block, f"{way}samplers"):
        if residual:
            h = sampler(h, temb=told.embedding)
        elif size is not None:
            h = sampler(h, size)
        else:
            h = sampler(h)
    return h
