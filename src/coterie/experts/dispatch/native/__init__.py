"""Feed-forward experts on a CPU by an operator of our own, forward and backward, in float32.

Rows are gathered into panels, weights are read where they lie (a forward pass copies none), the
activation is computed while its arguments are in the cache, and threads take whole blocks of rows
or whole experts instead of splitting every small product. Compiled by the machine's C compiler on
first use (:mod:`.build`); where that is impossible the other backends serve, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from coterie.core.graphs import recorded
from coterie.experts.dispatch.native.build import library
from coterie.experts.dispatch.native.memory import kept
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.dispatch.transforms import transformed
from coterie.experts.kinds.pool import ExpertPool

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOAT = torch.float32  # what the C sources read and write


def serves(x: Tensor, plan: DispatchPlan, pool: ExpertPool) -> bool:
    """A feed-forward kind in float32 on a CPU, contiguous weights, a compiler, and no transform
    that wants to see inside (``torch.func``, forward-mode gradients)."""
    if pool.kind.feed_forward() is None:
        return False
    return _serve((x, plan.gates), pool.stacks().values())


def serves_one(x: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """The same for the weights of one feed-forward expert, outside autocast, which
    :func:`coterie.experts.dispatch.dispatch` has left already."""
    return not torch.is_autocast_enabled("cpu") and _serve((x,), weights.values())


def _serve(rows: Iterable[Tensor], weights: Iterable[Tensor]) -> bool:
    """Rows are made contiguous where they are not; weights are read where they lie."""
    for value in rows:
        if value.dtype != _FLOAT or value.device.type != "cpu":
            return False
    for value in weights:
        if value.dtype != _FLOAT or value.device.type != "cpu" or not value.is_contiguous():
            return False
        if type(value) not in _PLAIN:
            return False
    return _may()


def _may() -> bool:
    if recorded():  # where nobody may have this operator
        return False
    return _ready() if torch.compiler.is_compiling() else _ready() and not transformed()


def _ready() -> bool:
    built = library()
    return built.ready and (built.parallel or torch.get_num_threads() == 1)


# What torch.compiler.assume_constant_result sets, which imports the compiler first: 2 s of every
# start, of which most never compile.
_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_native(x: Tensor, plan: DispatchPlan, pool: ExpertPool, float32: bool) -> Tensor:
    """x [R, D], or [B, N, D] with one routing per sample."""
    from coterie.experts.dispatch.native.op import experts

    if x.dim() == 3:
        plan = plan.per_token(x.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    return experts(rows, plan, pool.kind, pool.stacks()).view(x.shape)


def release_memory() -> int:
    """Give memory kept from one step to the next (:mod:`.memory`) back to the system; bytes."""
    return kept.release()


__all__ = ["library", "release_memory", "run_native", "serves", "serves_one"]
