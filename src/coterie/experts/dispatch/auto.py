"""Choice of the dispatch backend for a call, by rules from measurements (``coterie bench
experts``)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.graphs import recorded
from coterie.experts.dispatch import native
from coterie.experts.dispatch.backends import BACKENDS, available, run_fold, run_once
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.dispatch.single_expert import run_one
from coterie.experts.dispatch.triton import serves
from coterie.experts.kinds.pool import ExpertPool

_FOLD_TOKENS = 16  # tokens per sample from which mixing small weights pays
_FOLD_BYTES = 8 * 2**20  # mixed weights beyond this leave the cache ...
_FOLD_MANY_TOKENS = 128  # ... and pay only from this many tokens per sample
_SEGMENT_ROWS = 384  # rows per expert from which plain products are as fast
_SEGMENT_WORK = 10_000_000  # multiply-adds per expert below which calls, not products, cost


def choose(x: Tensor, plan: DispatchPlan, pool: ExpertPool) -> str:
    """The backend expected to be fastest for these rows, sizes, dtype and device.

    Measured on an AVX2 machine in float32, forward and training: the native operator leads wherever
    it can serve. Without it the grouped product leads while experts have few rows (its call
    overhead is per layer, not per expert, and its backward makes weight gradients without a copy);
    plain products on long segments are as fast or faster.
    """
    kernels = _kernels(x, plan, pool, "auto")
    if kernels is not None:
        return kernels
    usable = available(x, plan, pool)
    if "table" in usable:
        return "table"
    if "fold" in usable and _folding_pays(x, pool):
        return "fold"
    per_row = positions(x)
    rows = sum(plan.counts) * per_row / plan.num_experts
    if plan.num_experts == 1 or (min(plan.counts) == plan.num_rows and rows >= 64):
        return "dense"
    if "grouped" not in usable:
        return "sorted"
    if x.is_cuda:
        return "grouped"
    if x.dtype != torch.float32:
        return "sorted"  # the CPU's grouped product of 16-bit types is some 50 times slower
    weights = sum(stack.numel() // plan.num_experts for stack in pool.stacks().values())
    long = rows >= _SEGMENT_ROWS and rows * weights >= _SEGMENT_WORK
    return "sorted" if long else "grouped"


def _kernels(x: Tensor, plan: DispatchPlan, pool: ExpertPool, backend: str) -> str | None:
    """The backend with kernels of its own that serves this call, if any. They need not know the
    loads: counting makes the host wait for a GPU, and a compiled graph break.

    Where a row has a slot for every expert, triton's buffers for all slots would be larger than
    what most routings fill. Which is faster where both can serve is still to be measured on a GPU.
    """
    if backend in ("auto", "native") and native.serves(x, plan, pool):
        return "native"
    wanted = backend == "triton" or (backend == "auto" and x.is_cuda and plan.sparse)
    return "triton" if wanted and serves(x, pool) else None


def positions(x: Tensor) -> int:
    """Number of tokens or pixels in one row."""
    return math.prod(x.shape[2:] if x.dim() == 4 else x.shape[1:-1])


def _folding_pays(x: Tensor, pool: ExpertPool) -> bool:
    here = positions(x)
    if here >= _FOLD_MANY_TOKENS:
        return True
    weights = sum(stack[0].numel() for stack in pool.stacks().values())
    return here >= _FOLD_TOKENS and x.shape[0] * weights * x.itemsize <= _FOLD_BYTES


def dispatch(
    x: Tensor,
    plan: DispatchPlan,
    pool: ExpertPool,
    backend: str = "auto",
    float32: bool = False,
    always: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs.

    x is [R, D], [B, N, D] or [B, C, H, W]; the result has the kind's output shape and x's dtype. If
    the plan has N times as many rows as x, each row of x is routed N times in a row, and the result
    has the plan's rows. ``always``: weights of one more expert that every row uses with gate 1.
    Under autocast the products run in its dtype and their sum in float32. If ``backend`` cannot
    serve the call (grouped in float64, say), ``sorted`` does.
    """
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        x, float32 = x.to(torch.get_autocast_dtype(device)), True
    with torch.autocast(device, enabled=False):
        return _run(x, plan, pool.adapted(), backend, float32, always).to(dtype)


def _run(
    x: Tensor,
    plan: DispatchPlan,
    pool: ExpertPool,
    backend: str,
    float32: bool,
    always: Mapping[str, Tensor] | None,
) -> Tensor:
    if recorded():
        return _recorded(x, plan, pool, float32, always)
    kernels = _kernels(x, plan, pool, backend)
    if x.numel() == 0 or (kernels is None and sum(plan.counts) == 0):
        rows = x.shape if plan.unit == "sample" else (plan.num_rows, *x.shape[1:])
        y = attach(x.new_zeros(pool.kind.output_shape(rows)), plan, pool)
    elif plan.unit == "token" and plan.num_rows > len(x):
        if backend in ("auto", "dense") and always is None:
            return run_once(x, plan, pool, float32)
        x = x.repeat_interleave(plan.num_rows // len(x), dim=0)
        return _run(x, plan, pool, backend, float32, always)
    elif kernels is not None:
        y = BACKENDS[kernels](x, plan, pool, float32)
    else:
        name = choose(x, plan, pool) if backend == "auto" else backend
        name = name if name in available(x, plan, pool) else "sorted"
        if name == "fold":
            return run_fold(x, plan, pool, float32, always)
        y = BACKENDS[name](x, plan, pool, float32)
    return y if always is None else y + run_one(pool.kind, x, OneExpert(always, {}))


def _recorded(
    x: Tensor,
    plan: DispatchPlan,
    pool: ExpertPool,
    float32: bool,
    always: Mapping[str, Tensor] | None,
) -> Tensor:
    """The path of a graph that other inputs will run through: products of torch alone, and nothing
    of it decided by who was chosen. Every expert answers every row, as in ``dense``."""
    if pool.kind.batch_statistics and pool.training:
        hint = "the rows of each expert are counted on the host"
        allowed = "experts in eval mode"
        raise ConfigError(describe("torch.export or trace", pool.kind.kind, allowed, hint))
    if pool.kind.input_free:
        y = BACKENDS["table"](x, plan, pool, float32)
    elif plan.unit == "token" and plan.num_rows > x.shape[0]:
        y = run_once(x, plan, pool, float32)
        x = x.repeat_interleave(plan.num_rows // x.shape[0], dim=0)
    elif pool.kind.foldable and plan.unit == "sample":
        return run_fold(x, plan, pool, float32, always)
    else:
        y = BACKENDS["dense"](x, plan, pool, float32)
    return y if always is None else y + run_one(pool.kind, x, OneExpert(always, {}))


def attach(y: Tensor, plan: DispatchPlan, pool: ExpertPool) -> Tensor:
    """Keep gates and experts in the autograd graph, with zero gradient, although no row used them.

    Otherwise a process, or a batch of unconditional samples only, has parameters without a
    gradient, which data-parallel training does not support.
    """
    idle = [stack[:0].sum() for stack in pool.stacks().values()] + [plan.gates[:0].sum()]
    return y + torch.stack([value.to(y.dtype) for value in idle]).sum()
