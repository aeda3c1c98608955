"""The layer as torch sees it: a function with gradients, and the same for torch.compile.

Called directly it is an ``autograd.Function`` (an operator costs the host several times as much per
call, which small layers wait for); while compiling, and under modes that watch operators, it is
``coterie::triton_experts``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from coterie.experts.dispatch.triton.launch import Call, forward, gradients


def experts(
    tensors: tuple[Tensor | None, ...], activation: str, gated: bool, float32: bool, keep: bool
) -> Tensor:
    """y [R, D] from the tensors of :class:`launch.Call`, in its order; ``keep``: for a backward."""
    given: list[Any] = [*tensors, activation, gated, float32, keep]
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        y: Tensor = triton_experts(*given)[0]
        return y
    if not keep:
        return run_forward(*given)[0]
    y = _Experts.apply(*given[:-1])
    return y


def run_forward(
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


def run_backward(
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


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.activation, ctx.gated, _ = inputs
        given: list[Any] = [*inputs, True]
        y, hidden = run_forward(*given)
        ctx.save_for_backward(hidden, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, run_backward)


def _gradients(ctx: Any, dy: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    """In the places of the inputs."""
    hidden, x, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dy = dy.to(x.dtype).contiguous()
    made = run(dy, hidden, x, *tensors, ctx.activation, ctx.gated, needs[0], any(needs[5:9]))
    found: list[Tensor | None] = [None] * len(needs)
    for place, value in zip((0, 1, 5, 6, 7, 8), made):
        found[place] = value if needs[place] else None
    return tuple(found)


triton_experts = torch.library.custom_op("coterie::triton_experts", run_forward, mutates_args=())
triton_experts_backward = torch.library.custom_op(
    "coterie::triton_experts_backward", run_backward, mutates_args=()
)


@triton_experts.register_fake
def _(
    x: Tensor, gates: Tensor, ids: Tensor, order: Tensor, bounds: Tensor, up: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    float32, keep = rest[-2:]
    y = torch.empty_like(x, dtype=torch.float32 if float32 else x.dtype)
    return y, x.new_empty((ids.numel(), up.shape[1]) if keep else (0,))


@triton_experts_backward.register_fake
def _(dy: Tensor, hidden: Tensor, x: Tensor, gates: Tensor, *rest: Any) -> list[Tensor]:
    rows, weights = rest[-2:]
    learnt = rest[3:7] if weights else (None,) * 4
    found = (x if rows else None, gates, *learnt)
    return [x.new_empty(0) if value is None else torch.empty_like(value) for value in found]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, _, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, triton_experts_backward)


triton_experts.register_autograd(_backward, setup_context=_setup)


def _flops(x: Any, gates: Any, ids: Any, order: Any, bounds: Any, up: Any, down: Any, *_: Any,
           **__: Any) -> int:  # fmt: skip
    """Both products of every choice."""
    return 2 * int(ids[0]) * int(ids[1]) * (int(up[1]) * int(up[2]) + int(down[1]) * int(down[2]))


def _backward_flops(dy: Any, hidden: Any, *shapes: Any, **rest: Any) -> int:
    return 2 * _flops(*shapes, **rest)


register_flop_formula(torch.ops.coterie.triton_experts)(_flops)
register_flop_formula(torch.ops.coterie.triton_experts_backward)(_backward_flops)
