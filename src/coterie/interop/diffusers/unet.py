"""What the layers of a U-Net of diffusers are told, made as the network itself makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.backbones import unet_layers
from coterie.backbones.taps import Topology
from coterie.backbones.unet_layers import Told
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.interop.diffusers.conventions import labels_of

MASKED = -10000.0  # added to the scores of tokens that are not there


def topology(network: Any) -> Topology:
    """ConfigError for networks whose layers are not known, or told more than time and condition."""
    if not hasattr(network, "down_blocks") or not hasattr(network, "conv_in"):
        allowed = "a U-Net (UNet2DModel, UNet2DConditionModel)"
        raise ConfigError(describe("network", type(network).__name__, allowed))
    for name in ("addition_embed_type", "time_cond_proj_dim"):
        value = getattr(network.config, name, None)
        if value is not None:
            hint = "its layers are told what no condition here has"
            raise ConfigError(describe(f"network.config.{name}", value, "null", hint))
    if labels_of(network) == "vector":
        hint = "its layers are told what no condition here has"
        kind = network.config.class_embed_type
        raise ConfigError(describe("network.config.class_embed_type", kind, "null, timestep", hint))
    kind = getattr(network.config, "time_embedding_type", "positional")
    if kind != "positional":
        raise ConfigError(describe("network.config.time_embedding_type", kind, "positional"))
    width = network.time_embedding.linear_2.out_features
    seen = getattr(network.config, "cross_attention_dim", None) or 0
    if not isinstance(seen, int):
        hint = "aggregators attend to tokens of one width"
        raise ConfigError(describe("network.config.cross_attention_dim", seen, "a number", hint))
    return Topology(unet_layers.points(network), width, seen)


def told_of(network: Any, x: Tensor, time: Tensor, cond: Condition) -> Told:
    """For x [B, C, H, W] as the network reads it, at ``time`` [B] of its own grid."""
    sinusoid = network.time_proj(time).to(x.dtype)
    tau = network.time_embedding(sinusoid)
    embedding = tau
    if network.class_embedding is not None:
        embedding = _with_class(network, x, tau, cond)
    if getattr(network, "time_embed_act", None) is not None:
        embedding = network.time_embed_act(embedding)
    tokens, bias, mask = cond.tokens, None, cond.tokens_mask
    if hasattr(network, "process_encoder_hidden_states"):
        if tokens is None:
            hint = "its layers attend to a text"
            raise DataError(describe("cond.tokens", None, "tokens [B, M, C]", hint))
        tokens = network.process_encoder_hidden_states(tokens.to(x), {})
        if mask is not None:
            bias = ((1 - mask.to(x.dtype)) * MASKED).unsqueeze(1)
    ctx = Context(batch=x.shape[0], tokens=0, time_embedding=tau, embedding=embedding)
    return Told(embedding, ctx, tokens=tokens, bias=bias, shown=tokens, mask=mask)


def _with_class(network: Any, x: Tensor, tau: Tensor, cond: Condition) -> Tensor:
    """The embedding of the noise level with that of the class."""
    if cond.label is None:
        raise DataError(describe("cond.label", None, "labels [B]: the network has classes"))
    labels: Any = cond.label
    if network.config.class_embed_type == "timestep":
        labels = network.time_proj(labels).to(x.dtype)
    row: Tensor = network.class_embedding(labels).to(x.dtype)
    if getattr(network.config, "class_embeddings_concat", False):
        return torch.cat([tau, row], dim=-1)
    return tau + row
