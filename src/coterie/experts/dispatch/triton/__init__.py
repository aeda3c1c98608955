"""Triton kernels for feed-forward experts on CUDA: products that read and write rows by index.

Rows are gathered inside the first product, the activation is its epilogue, gates and the scatter
that of the second; what the backward reads is x and the argument of the activation, [R * K, 2F].
The order of experts is made on the device: a call never waits for it, and can be captured in a
graph.
Nothing here imports triton before a call that can use it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from coterie.experts.dispatch.plan import DispatchPlan, by_expert
from coterie.experts.dispatch.transforms import transformed
from coterie.experts.kinds.pool import ExpertPool

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter: for tests, not for speed."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def serves(x: Tensor, pool: ExpertPool) -> bool:
    """A feed-forward kind in a type the kernels know, on a device they run on."""
    on = x.is_cuda or (x.device.type == "cpu" and interpreting())
    if not on or x.dtype not in _TYPES or pool.kind.feed_forward() is None or not _INSTALLED:
        return False
    return torch.compiler.is_compiling() or not transformed()


def run_triton(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """x [R, D], or [B, N, D] with one routing per sample."""
    from coterie.experts.dispatch.triton.op import experts

    made = pool.kind.feed_forward()
    assert made is not None
    if x.dim() == 3:
        plan = plan.per_token(x.shape[1])
    stacks = {name: stack.to(x.dtype).contiguous() for name, stack in pool.stacks().items()}
    weights = [stacks[made.up], stacks[made.down]]
    biases = [None if name is None else stacks[name] for name in (made.up_bias, made.down_bias)]
    leaves = (x, plan.gates, *stacks.values())
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    gates, ids = plan.gates.float().contiguous(), plan.ids.contiguous()
    tensors = (rows, gates, ids, *by_expert(ids, plan.num_experts), *weights, *biases)
    return experts(tensors, made.activation, made.gated, float32, keep).view(x.shape)
