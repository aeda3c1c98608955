"""Backends that compute ``y[r] = sum_k gate[r, k] * expert[id[r, k]](x[r])``; results are equal.

``loop`` is the reference. ``sorted`` runs each expert once on its contiguous rows. ``grouped``
hands all segments to torch's grouped product. ``dense`` runs every expert on every row (right for k
= E). ``fold`` mixes the weights of linear experts per sample, ``table`` serves experts that ignore
x, ``once`` serves several routings of one row; ``triton`` has kernels for CUDA, ``native`` for
float32 on a CPU. Parameters are split by ``unbind``: indexing a stack per expert makes its backward
grow as E^2.

``float32``: sum the experts' outputs in float32 at least; the caller casts back. x is [R, D] for
unit "token" and [B, N, D] or, for experts on feature maps, [B, C, H, W] for unit "sample" (a row is
then a whole sample).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.graphs import recorded
from coterie.experts.dispatch import native
from coterie.experts.dispatch.expert_weights import (
    BatchedExperts,
    OneExpert,
    SortedExperts,
    experts_of,
)
from coterie.experts.dispatch.plan import DispatchPlan, one_hot_rows, scale_rows
from coterie.experts.dispatch.sorted_rows import sorted_rows, zeros
from coterie.experts.dispatch.triton import run_triton, serves
from coterie.experts.kinds.pool import ExpertPool


def run_loop(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Plain loop over experts and masks: the definition."""
    y = zeros(x, pool.kind, float32)
    for e, weights in enumerate(experts_of(pool)):
        rows, slots = (plan.ids == e).nonzero(as_tuple=True)
        out = pool.kind.forward(x.index_select(0, rows), weights)
        y = y.index_add(0, rows, scale_rows(out, plan.gates[rows, slots], float32))
    return y


def run_dense(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Every expert on every row; rows without a choice are set to 0."""
    used = one_hot_rows(plan.ids, plan.num_experts).any(dim=1)
    x = torch.where(used.reshape(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))
    y = zeros(x, pool.kind, float32)
    for gate, weights in zip(plan.dense_gates().unbind(1), experts_of(pool)):
        y = y + scale_rows(pool.kind.forward(x, weights), gate, float32)
    return y


def run_sorted(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Gather rows by expert, one call per expert that has any, scatter-add."""
    return sorted_rows(x, plan, pool.kind, experts_of(pool), float32)


def run_grouped(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Gather rows by expert, one grouped product per weight, scatter-add."""
    taken = x.index_select(0, plan.rows)
    flat = taken.reshape(-1, x.shape[-1])
    repeat = 1 if x.dim() == 2 else x.shape[1]
    out = pool.kind.forward(flat, SortedExperts(pool, plan, repeat))
    out = out.view(*taken.shape[:-1], out.shape[-1])
    values = scale_rows(out, plan.sorted_gates, float32)
    return zeros(x, pool.kind, float32).index_add(0, plan.rows, values)


def run_fold(
    x: Tensor,
    plan: DispatchPlan,
    pool: ExpertPool,
    float32: bool,
    always: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One expert per sample, with weights ``always + sum_k g_k W_k``: exact for linear experts.

    While sampling, all samples stand at one noise level: then one map serves the whole batch.
    """
    gates = plan.dense_gates()
    if not torch.is_grad_enabled() and not recorded() and bool((gates == gates[:1]).all()):
        gates = gates[:1]
    mixed = {}
    for name, stack in pool.stacks().items():
        # In the weights' own type: what experts add to a kernel may be small beside it.
        mixed[name] = (gates.to(stack.dtype) @ stack.flatten(1)).unflatten(1, stack.shape[1:])
        if always is not None:
            mixed[name] = mixed[name] + always[name]
    if gates.shape[0] == 1:
        return pool.kind.forward(x, OneExpert({n: rows[0] for n, rows in mixed.items()}, {}))
    return pool.kind.forward(x, BatchedExperts(mixed))


def run_table(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Experts that ignore x: one row per sample, broadcast over its tokens (not copied)."""
    (table,) = (value for _, value in pool.named_buffers(recurse=False))
    padded = F.pad(table, (0, 0, 0, 1))
    y = torch.einsum("rk,rkd->rd", plan.gates, padded[plan.ids]).to(x.dtype)
    return y if x.dim() == 2 else y[:, None, :].expand(x.shape)


def run_once(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """Several routings of each row: x [B, D], plan [B * N, K] -> [B * N, D].

    Every chosen expert runs once on each row, and each routing weights the outputs.
    """
    chosen = list(range(pool.num_experts))
    if not recorded():
        chosen = [e for e in chosen if plan.counts[e]]
    gates = plan.dense_gates()
    tensors = {**pool.stacks(), **dict(pool.named_buffers(recurse=False))}
    if len(chosen) < pool.num_experts:
        some = torch.tensor(chosen, device=x.device)
        gates = gates.index_select(1, some)
        tensors = {name: stack.index_select(0, some) for name, stack in tensors.items()}
    own = {name: tensors.pop(name) for name in pool.names}
    y_EBO = pool.kind.forward_all(x, BatchedExperts(own, tensors, pool.training), chosen)
    if len(chosen) < pool.num_experts and pool.training:
        for name, stack in pool.statistics().items():
            stack.index_copy_(0, some, tensors[name])
    gates_BNE = gates.unflatten(0, (x.shape[0], -1))
    wide = torch.promote_types(x.dtype, torch.float32) if float32 else x.dtype
    return torch.bmm(gates_BNE.to(wide), y_EBO.transpose(0, 1).to(wide)).flatten(0, 1)


BACKENDS: dict[str, Callable[[Tensor, DispatchPlan, ExpertPool, bool], Tensor]] = {
    "loop": run_loop,
    "dense": run_dense,
    "sorted": run_sorted,
    "grouped": run_grouped,
    "triton": run_triton,
    "native": native.run_native,
    "fold": run_fold,
    "table": run_table,
}


def grouped_works(x: Tensor, pool: ExpertPool) -> bool:
    """torch 2.13's grouped product: no float64, rows of a multiple of 16 bytes, not compiled.

    On CUDA only bfloat16 has a kernel of its own; elsewhere it would be a slow loop.
    """
    if torch.compiler.is_compiling() or not hasattr(F, "grouped_mm") or pool.kind.grid:
        return False
    if not pool.names or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and x.dtype != torch.bfloat16:
        return False
    sizes = [size for s in pool.stacks().values() if s.dim() == 3 for size in s.shape[1:]]
    return all((size * x.itemsize) % 16 == 0 for size in sizes)


def available(x: Tensor, plan: DispatchPlan, pool: ExpertPool) -> list[str]:
    """Names of the backends that can serve this call."""
    names = ["loop", "dense", "sorted"]
    partial = pool.kind.batch_statistics and pool.training and min(plan.counts) < plan.num_rows
    if partial:  # rows that did not choose an expert are none of its batch
        names.remove("dense")
    if grouped_works(x, pool):
        names.append("grouped")
    if serves(x, pool):
        names.append("triton")
    if native.serves(x, plan, pool):
        names.append("native")
    if pool.kind.foldable and plan.unit == "sample":
        names.append("fold")
    if pool.kind.input_free:
        names.append("table")
    return names
