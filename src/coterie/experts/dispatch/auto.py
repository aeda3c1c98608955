"""Which backend serves a call: a rule read off measurements (``coterie bench experts``)."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.experts.dispatch.backends import BACKENDS, available
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.kinds.pool import ExpertPool


def choose(x: Tensor, plan: DispatchPlan, pool: ExpertPool) -> str:
    """The backend expected to be fastest for these rows, sizes, dtype and gradient mode."""
    usable = available(x, plan, pool)
    if "table" in usable:
        return "table"
    if plan.num_experts == 1:
        return "dense"
    if "fold" in usable and x.shape[1] >= 16:
        return "fold"
    if "grouped" in usable:
        return "grouped"
    return "sorted"


def dispatch(
    x: Tensor, plan: DispatchPlan, pool: ExpertPool, backend: str = "auto", float32: bool = False
) -> Tensor:
    """Combine the chosen experts' answers. x [R, D] or [B, N, D] -> the same shape.

    A backend that cannot serve the call (grouped in float64, say) gives way to ``sorted``.
    """
    if sum(plan.counts) == 0 or x.numel() == 0:
        return attach(torch.zeros_like(x), plan, pool)
    name = choose(x, plan, pool) if backend == "auto" else backend
    if name not in available(x, plan, pool):
        name = "sorted"
    return BACKENDS[name](x, plan, pool, float32)


def attach(y: Tensor, plan: DispatchPlan, pool: ExpertPool) -> Tensor:
    """Keep gates and experts in the graph with zero gradient although no row used them.

    Without this, a rank (or a batch of only unconditional samples) has parameters without a
    gradient, which data-parallel training does not survive.
    """
    idle = [stack[:0].sum() for stack in pool.stacks().values()] + [plan.gates[:0].sum()]
    return y + torch.stack([value.to(y.dtype) for value in idle]).sum()
