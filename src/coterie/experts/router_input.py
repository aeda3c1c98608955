"""The input of a layer's router. B samples, N tokens, D width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.experts.layer_limits import TRUNK_ONLY

Reads = Literal["input", "stream", "normalised"]


def router_input(x: Tensor, ctx: Context, reads: Reads, time: bool) -> Tensor:
    """[B, N, ...]: the router's input, where experts read x [B, N, D] or [B, C, H, W].

    With ``time`` the sample's time embedding is appended to each row.
    """
    rows = {"input": x, "stream": ctx.stream, "normalised": ctx.normalised}[reads]
    if rows is None:
        raise ConfigError(describe("router_reads", reads, "input", TRUNK_ONLY))
    if rows.dim() == 4:
        rows = rows.flatten(2).transpose(1, 2)
    if not time:
        return rows
    if ctx.time_embedding is None:
        raise ConfigError("router_reads_time: it needs a time embedding in the context")
    each = ctx.time_embedding[:, None].expand(-1, rows.shape[1], -1)
    return torch.cat([rows, each.to(rows.dtype)], dim=2)


def noise_task(ctx: Context, num_tasks: int) -> Tensor:
    """i64 [B]: which of ``num_tasks`` equal parts of the original grid the sample's step is in."""
    if ctx.step_index is None:
        raise ConfigError("noise_tasks: they need a step of the noise grid in the context")
    return ctx.step_index * num_tasks // ctx.num_steps
