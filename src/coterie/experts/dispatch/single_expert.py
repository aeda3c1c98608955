"""One expert on every row: what shared, folded and dense feed-forward networks are."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.experts.dispatch import native
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.kinds.base import ExpertKind

_TRAINED_ROWS = 32  # from which a backward pass of our own pays for what it costs to call


def run_one(kind: ExpertKind, x: Tensor, one: OneExpert) -> Tensor:
    """``kind.forward(x, one)``; x [..., D]. By the native operator where that can serve: its
    activation costs little, since it is computed while its arguments are in the cache."""
    made = kind.feed_forward()
    if made is None or x.numel() == 0 or not native.serves_one(x, one.parameters):
        return kind.forward(x, one)
    from coterie.experts.dispatch.native import op

    leaves = (x, *one.parameters.values())
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if not keep and not op.watched():
        return op.run_one(x, made, one.parameters)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < _TRAINED_ROWS:
        return kind.forward(x, one)
    gates = rows.new_ones(len(rows), 1)
    whole = DispatchPlan("token", gates.new_zeros(gates.shape, dtype=torch.long), gates, 1)
    stacks = {name: weight[None] for name, weight in one.parameters.items()}
    return op.experts(rows, whole, kind, stacks).view(x.shape)
