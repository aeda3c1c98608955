"""The operator as torch sees it: a function with gradients, and the same for torch.compile.

Called directly it is an ``autograd.Function`` (tens of microseconds less per call than a registered
operator); while compiling, and under modes that watch operators, it is ``coterie::native_experts``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from coterie.core.errors import ConfigError, describe
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.native.build import library
from coterie.experts.dispatch.native.memory import kept
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.dispatch.sorted_rows import sorted_rows
from coterie.experts.kinds.base import ExpertKind, FeedForward

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""As ``activation.h`` numbers them."""

_NUMBERS = ("rows", "slots", "experts", "width", "hidden", "gated", "activation", "threads")
_TENSORS = ("x", "gates", "w1", "b1", "w2", "b2", "ids", "y", "saved", "parts", "dy")
_GRADIENTS = ("dx", "dgates", "dw1", "db1", "dw2", "db2")


class _Call(ctypes.Structure):
    """``Call`` of routing.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in ("parallel", *_TENSORS, *_GRADIENTS)),
    ]


def experts(
    x: Tensor, plan: DispatchPlan, kind: ExpertKind, stacks: Mapping[str, Tensor]
) -> Tensor:
    """x f32 [R, D] -> [R, D] by the plan's R rows; ``stacks``: the weights [E, ...] of the kind,
    which is a feed-forward network."""
    made = kind.feed_forward()
    assert made is not None
    names = (made.up, made.up_bias, made.down, made.down_bias)
    weights: list[Any] = [None if name is None else stacks[name] for name in names]
    leaves = (x, plan.gates, *(weight for weight in weights if weight is not None))
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    activation = ACTIVATIONS[made.activation]
    rows, ids, gates = x.contiguous(), plan.ids.contiguous(), plan.gates.contiguous()
    if watched():
        y: Tensor = native_experts(rows, gates, ids, *weights, activation, made.gated, keep)[0]
        return y
    given: list[Any] = [rows, gates, ids, *weights, activation, made.gated]
    if not keep:
        return run_forward(*[*given, False])[0]
    y = _Experts.apply(*given, (kind, names))
    return y


def watched() -> bool:
    """Whether somebody wants to see operators of torch: a compiler, or a mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def run_forward(
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y [R, D] and, with ``keep``, the arguments of the activations, for the backward."""
    y, saved = torch.empty_like(x), kept.empty((saved_size(ids, w1) if keep else 0,))
    given = {"x": x, "gates": gates, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "ids": ids, "y": y}
    _call("forward", activation, gated, given | {"saved": saved if keep else None})
    return y, saved


def run_backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor,
    gates: Tensor,
    ids: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    rows: bool,
    weights: bool,
) -> list[Tensor]:
    """Gradients of x, gates, w1, b1, w2, b2; [0] where there is none or none was asked for."""
    wanted = [x if rows else None, gates, *((w1, b1, w2, b2) if weights else (None,) * 4)]
    found = [None if value is None else kept.empty(value.shape) for value in wanted]
    given = {
        "x": x,
        "gates": gates,
        "w1": w1,
        "b1": b1,
        "w2": w2,
        "b2": b2,
        "ids": ids,
        "saved": saved,
        "dy": dy,
    }
    _call("backward", activation, gated, given | dict(zip(_GRADIENTS, found)))
    return [x.new_empty(0) if value is None else value for value in found]


def run_one(x: Tensor, made: FeedForward, weights: Mapping[str, Tensor]) -> Tensor:
    """The answer of one expert to every row of x [..., D], with no gradient to be taken and nobody
    watching: little is done around the call, which counts where rows are few."""
    built = library()
    assert built.handle is not None
    x = x.contiguous()
    rows = x.numel() // x.shape[-1]
    ids, gates = _everybody(rows)
    w1, w2, y = weights[made.up], weights[made.down], torch.empty_like(x)
    b1, b2 = (None if n is None else weights[n].data_ptr() for n in (made.up_bias, made.down_bias))
    call = _Call(
        *(rows, 1, 1, w1.shape[1], w2.shape[1], made.gated, ACTIVATIONS[made.activation]),
        torch.get_num_threads() if built.parallel else 1,
        built.openmp,
        *(x.data_ptr(), gates.data_ptr(), w1.data_ptr(), b1, w2.data_ptr(), b2, ids.data_ptr()),
        y.data_ptr(),
    )
    if w1.dim() != 2 or w1.shape[1] != x.shape[-1] or w2.shape[0] != x.shape[-1]:
        _refuse_sizes("forward", x.shape, w1.shape, w2.shape)
    if w1.shape[0] != (2 if made.gated else 1) * w2.shape[1]:
        _refuse_sizes("forward", x.shape, w1.shape, w2.shape)
    failed = built.handle.coterie_experts_forward(ctypes.byref(call))
    if failed:
        _raise(failed, "forward", x.shape, w1.shape, w2.shape)
    return y


@lru_cache(maxsize=32)
def _everybody(rows: int) -> tuple[Tensor, Tensor]:
    """Choices and gates of rows that all use expert 0."""
    ids = torch.zeros(rows, dtype=torch.long, device="cpu")
    return ids, torch.ones(rows, dtype=torch.float32, device="cpu")


def saved_size(ids: Tensor, w1: Tensor) -> Any:
    """Numbers kept for the backward: each expert's rows in whole registers."""
    choices = ids.shape[0] * ids.shape[1]
    return (choices + (library().vector - 1) * min(choices, w1.shape[0])) * w1.shape[1]


def _call(which: str, activation: int, gated: bool, tensors: dict[str, Tensor | None]) -> None:
    built = library()
    assert built.handle is not None
    ids, w1, w2 = tensors["ids"], tensors["w1"], tensors["w2"]
    assert ids is not None and w1 is not None and w2 is not None
    _check(which, gated, tensors)
    threads = torch.get_num_threads() if built.parallel else 1
    numbers = (*ids.shape, w1.shape[0], w1.shape[2], w2.shape[2], gated, activation, threads)
    call = _Call(*numbers, parallel=built.openmp)
    if ids.shape[1] > 1:  # an answer per choice, or a gradient of x, before they are summed
        tensors["parts"] = kept.empty((ids.numel() * w1.shape[2],))
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    failed = getattr(built.handle, f"coterie_experts_{which}")(ctypes.byref(call))
    if failed:
        _raise(failed, which, ids.shape, w1.shape, w2.shape)


def _check(which: str, gated: bool, tensors: Mapping[str, Tensor | None]) -> None:
    """ConfigError unless every tensor has the size that the C code takes it to have."""
    ids, w1, w2 = tensors["ids"], tensors["w1"], tensors["w2"]
    assert ids is not None and w1 is not None and w2 is not None
    shapes = ids.shape, w1.shape, w2.shape
    if tuple(map(len, shapes)) != (2, 3, 3):
        _refuse_sizes(which, *shapes)
    rows, (experts, inner, width) = ids.shape[0], w1.shape
    hidden = w2.shape[2]
    wanted: dict[str, tuple[int, ...]] = {
        "x": (rows, width),
        "dy": (rows, width),
        "gates": tuple(ids.shape),
        "w1": (experts, 2 * hidden if gated else hidden, width),
        "b1": (experts, inner),
        "w2": (experts, width, hidden),
        "b2": (experts, width),
    }
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is not None and tuple(found.shape) != shape:
            _refuse_sizes(which, *shapes)


def _raise(failed: int, which: str, rows: Any, w1: Any, w2: Any) -> NoReturn:
    if failed == 1:
        raise MemoryError(f"experts {which}: no memory for {rows[0]} rows")
    _refuse_sizes(which, rows, w1, w2)


def _refuse_sizes(which: str, rows: Any, w1: Any, w2: Any) -> NoReturn:
    found = f"rows {tuple(rows)}, weights {tuple(w1)} and {tuple(w2)}"
    allowed = "sizes of 1 and more that fit each other, [E, F, D] and [E, D, F] (2F where gated)"
    raise ConfigError(describe(f"native experts {which}", found, allowed))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.activation, ctx.gated, ctx.expert = inputs
        y, saved = run_forward(*[*inputs[:-1], True])
        ctx.save_for_backward(saved, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: by operations that have gradients themselves
            return _differentiable(ctx, dy)
        saved, *tensors = ctx.saved_tensors
        return _place(
            needs, dy.contiguous(), saved, tensors, ctx.activation, ctx.gated, run_backward
        )


def _place(
    needs: tuple[bool, ...],
    dy: Tensor,
    saved: Tensor,
    tensors: list[Any],
    activation: int,
    gated: bool,
    run: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients in the places of the inputs: x, gates, ids, four weights, and what is no tensor."""
    made = run(dy, saved, *tensors, activation, gated, needs[0], any(needs[3:7]))
    found: list[Tensor | None] = [None] * len(needs)
    for place, value in zip((0, 1, 3, 4, 5, 6), made):
        found[place] = value if needs[place] else None
    return tuple(found)


def _differentiable(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, x, gates, ids, *weights = ctx.saved_tensors
    kind, names = ctx.expert
    stacks = {name: stack.unbind(0) for name, stack in zip(names, weights) if name is not None}
    made = DispatchPlan("token", ids, gates, len(weights[0]))
    experts = [
        OneExpert({name: split[e] for name, split in stacks.items()}, {})
        for e in range(made.num_experts)
    ]
    needs = ctx.needs_input_grad
    inputs = (x, gates, ids, *weights)
    places = [place for place, value in enumerate(inputs) if needs[place]]
    found: list[Tensor | None] = [None] * len(needs)
    if sum(made.counts):
        y = sorted_rows(x, made, kind, experts, False)
        some = [inputs[place] for place in places]
        grads = torch.autograd.grad(y, some, dy, create_graph=True, allow_unused=True)
        for place, grad in zip(places, grads):
            found[place] = grad
    return tuple(found)


native_experts = torch.library.custom_op(
    "coterie::native_experts", run_forward, mutates_args=(), device_types="cpu"
)
native_experts_backward = torch.library.custom_op(
    "coterie::native_experts_backward", run_backward, mutates_args=(), device_types="cpu"
)


@native_experts.register_fake
def _(x, gates, ids, w1, b1, w2, b2, activation, gated, keep):
    return torch.empty_like(x), x.new_empty(saved_size(ids, w1) if keep else 0)


@native_experts_backward.register_fake
def _(dy, saved, x, gates, ids, w1, b1, w2, b2, activation, gated, rows, weights):
    found = [x if rows else None, gates, *((w1, b1, w2, b2) if weights else (None,) * 4)]
    return [x.new_empty(0) if value is None else torch.empty_like(value) for value in found]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    saved, *tensors = ctx.saved_tensors
    needs, dy = ctx.needs_input_grad, dy.contiguous()
    return _place(needs, dy, saved, tensors, ctx.activation, ctx.gated, native_experts_backward)


native_experts.register_autograd(_backward, setup_context=_setup)


def _flops(x: Any, gates: Any, ids: Any, w1: Any, b1: Any, w2: Any, *_: Any, **__: Any) -> int:
    """Both products of every choice."""
    return 2 * int(ids[0]) * int(ids[1]) * (int(w1[1]) * int(w1[2]) + int(w2[1]) * int(w2[2]))


def _backward_flops(dy: Any, saved: Any, *shapes: Any, **rest: Any) -> int:
    return 2 * _flops(*shapes, **rest)


register_flop_formula(torch.ops.coterie.native_experts)(_flops)
register_flop_formula(torch.ops.coterie.native_experts_backward)(_backward_flops)
