"""The layer as two operators of torch, so that autograd and torch.compile know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.experts.dispatch.triton.launch import Call, forward, gradients


@torch.library.custom_op("coterie::experts", mutates_args=())
def experts(
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    bounds: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    float32: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y [R, D] and, with ``keep``, what the backward reads; see :class:`launch.Call`."""
    call = Call(x, gates, ids, order, bounds, up, down, up_bias, down_bias, activation, gated)
    return forward(call, keep, torch.float32 if float32 else x.dtype)


@experts.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    bounds: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    float32: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.float32 if float32 else x.dtype)
    return y, x.new_empty((ids.numel(), up.shape[1]) if keep else (0,))


@torch.library.custom_op("coterie::experts_backward", mutates_args=())
def experts_backward(
    dy: Tensor,
    hidden: Tensor,
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    bounds: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    rows: bool,
    weights: bool,
) -> list[Tensor]:
    """Gradients of x, gates, up, down, up_bias, down_bias; [0] where there is none."""
    call = Call(x, gates, ids, order, bounds, up, down, up_bias, down_bias, activation, gated)
    made = gradients(call, hidden, dy, rows, weights)
    found = (made.x, made.gates, made.up, made.down, made.up_bias, made.down_bias)
    return [x.new_empty(0) if value is None else value for value in found]


@experts_backward.register_fake
def _(
    dy: Tensor,
    hidden: Tensor,
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    order: Tensor,
    bounds: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    rows: bool,
    weights: bool,
) -> list[Tensor]:
    learnt = [up, down, up_bias, down_bias] if weights else [None] * 4
    found = [x if rows else None, gates, *learnt]
    return [x.new_empty(0) if value is None else torch.empty_like(value) for value in found]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, _, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    hidden, x, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    weights = any(needs[5:9])
    dy = dy.to(x.dtype).contiguous()
    made = experts_backward(dy, hidden, x, *tensors, ctx.activation, ctx.gated, needs[0], weights)
    places = (0, 1, 5, 6, 7, 8)
    grads: list[Tensor | None] = [None] * len(needs)
    for place, value in zip(places, made):
        grads[place] = value if needs[place] else None
    return tuple(grads)


experts.register_autograd(_backward, setup_context=_setup)
