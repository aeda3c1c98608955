"""Which backend serves a call: a rule read off measurements (``coterie bench experts``)."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.experts.dispatch.backends import BACKENDS, available
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.kinds.pool import ExpertPool

_FOLD_TOKENS = 16  # tokens per sample from which mixing small weights pays
_FOLD_BYTES = 8 * 2**20  # mixed weights beyond this leave the cache ...
_FOLD_MANY_TOKENS = 128  # ... and pay only from this many tokens per sample
_SEGMENT_ROWS = 384  # rows per expert from which plain products are as fast
_SEGMENT_WORK = 10_000_000  # multiply-adds per expert below which calls, not products, cost


def choose(x: Tensor, plan: DispatchPlan, pool: ExpertPool) -> str:
    """The backend expected to be fastest for these rows, sizes, dtype and device.

    Measured on an AVX2 machine in float32, forward and training: the grouped product leads while
    experts have few rows (its call overhead is per layer, not per expert, and its backward makes
    weight gradients without a copy); plain products on long segments are as fast or faster.
    """
    usable = available(x, plan, pool)
    if "table" in usable:
        return "table"
    if "fold" in usable and _folding_pays(x):
        return "fold"
    per_row = 1 if x.dim() == 2 else x.shape[1]
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


def _folding_pays(x: Tensor) -> bool:
    batch, tokens, width = x.shape
    if tokens >= _FOLD_MANY_TOKENS:
        return True
    return tokens >= _FOLD_TOKENS and batch * width * width * x.itemsize <= _FOLD_BYTES


def dispatch(
    x: Tensor, plan: DispatchPlan, pool: ExpertPool, backend: str = "auto", float32: bool = False
) -> Tensor:
    """Combine the chosen experts' answers. x [R, D] or [B, N, D] -> the same shape and type.

    Under autocast the products run in its type and their sum in float32. A backend that cannot
    serve the call (grouped in float64, say) gives way to ``sorted``.
    """
    if sum(plan.counts) == 0 or x.numel() == 0:
        return attach(torch.zeros_like(x), plan, pool)
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        x, float32 = x.to(torch.get_autocast_dtype(device)), True
    name = choose(x, plan, pool) if backend == "auto" else backend
    if name not in available(x, plan, pool):
        name = "sorted"
    with torch.autocast(device, enabled=False):
        return BACKENDS[name](x, plan, pool, float32).to(dtype)


def attach(y: Tensor, plan: DispatchPlan, pool: ExpertPool) -> Tensor:
    """Keep gates and experts in the graph with zero gradient although no row used them.

    Without this, a rank (or a batch of only unconditional samples) has parameters without a
    gradient, which data-parallel training does not survive.
    """
    idle = [stack[:0].sum() for stack in pool.stacks().values()] + [plan.gates[:0].sum()]
    return y + torch.stack([value.to(y.dtype) for value in idle]).sum()
