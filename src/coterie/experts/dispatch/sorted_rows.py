"""Rows gathered by expert, one call for each that has any, added where they came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.plan import DispatchPlan, scale_rows
from coterie.experts.kinds.base import ExpertKind


def sorted_rows(
    x: Tensor, plan: DispatchPlan, kind: ExpertKind, experts: Sequence[OneExpert], float32: bool
) -> Tensor:
    """By experts that need not stand in a pool; ``plan`` of unit "token"."""
    segments = x.index_select(0, plan.rows).split(plan.counts)
    outs = [
        kind.forward(segment, weights)
        for segment, weights in zip(segments, experts)
        if segment.shape[0]
    ]
    values = scale_rows(torch.cat(outs), plan.sorted_gates, float32)
    return zeros(x, kind, float32).index_add(0, plan.rows, values)


def zeros(x: Tensor, kind: ExpertKind, float32: bool) -> Tensor:
    """Zeros of x's shape to sum the experts' outputs in; with ``float32`` in at least that type."""
    dtype = torch.promote_types(x.dtype, torch.float32) if float32 else x.dtype
    return x.new_zeros(kind.output_shape(x.shape), dtype=dtype)
