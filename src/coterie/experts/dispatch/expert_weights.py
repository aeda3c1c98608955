"""The weights that an expert's forward pass uses: of one expert, of a batch, or of sorted rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.experts.dispatch.normalise import Statistics, normalise, normalise_segments
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.kinds.base import Geometry
from coterie.experts.kinds.pool import ExpertPool


class OneExpert:
    """Weights of a single expert (or of several with equal leading structure)."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        training: bool = False,
    ) -> None:
        self.parameters = parameters
        self.buffers = buffers
        self.training = training

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        return F.linear(
            x,
            self.parameters[weight].to(x.dtype),
            None if bias is None else self.parameters[bias].to(x.dtype),
        )

    def conv(self, x: Tensor, weight: str, bias: str | None, geometry: Geometry) -> Tensor:
        shift = None if bias is None else self.parameters[bias].to(x.dtype)
        return F.conv2d(x, self.parameters[weight].to(x.dtype), shift, *geometry)

    def vector(self, name: str, x: Tensor) -> Tensor:
        return self.parameters[name].to(x.dtype)

    def constant(self, name: str) -> Tensor:
        return self.buffers[name]

    def normalise(self, x: Tensor, momentum: float, eps: float) -> Tensor:
        statistics = Statistics(self.buffers, self.training, momentum, eps)
        return normalise(x.flatten(0, -2), statistics).view(x.shape)


class BatchedExperts:
    """An expert for each entry of x's first dimension, one mixed of others (``fold``) or one of the
    pool: parameters [B, ...]."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
        training: bool = False,
    ) -> None:
        self.parameters = parameters
        self.buffers = buffers or {}
        self.training = training

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """x [B, N, in]."""
        matrices = self.parameters[weight].to(x.dtype).transpose(1, 2)
        if bias is None:
            return torch.bmm(x, matrices)
        return torch.baddbmm(self.parameters[bias].to(x.dtype)[:, None, :], x, matrices)

    def conv(self, x: Tensor, weight: str, bias: str | None, geometry: Geometry) -> Tensor:
        """One convolution with as many groups as there are samples (CondConv, section 3.2)."""
        kernels = self.parameters[weight].to(x.dtype)
        shift = None if bias is None else self.parameters[bias].to(x.dtype).flatten()
        whole = geometry._replace(groups=geometry.groups * len(x))
        y = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), shift, *whole)
        return y.view(len(x), -1, *y.shape[2:])

    def vector(self, name: str, x: Tensor) -> Tensor:
        return self.parameters[name].to(x.dtype)[:, None, :]

    def constant(self, name: str) -> Tensor:
        return self.buffers[name][:, None]

    def normalise(self, x: Tensor, momentum: float, eps: float) -> Tensor:
        return normalise(x, Statistics(self.buffers, self.training, momentum, eps))


def experts_of(pool: ExpertPool) -> list[OneExpert]:
    """The pool's experts, split with one backward per stack."""
    pool = pool.adapted()
    buffers = {name: table.unbind(0) for name, table in pool.named_buffers(recurse=False)}
    return [
        OneExpert(own, {name: rows[e] for name, rows in buffers.items()}, pool.training)
        for e, own in enumerate(pool.unbind())
    ]


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: the grouped product's backward needs strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class SortedExperts:
    """All experts at once on rows [A, in] sorted by expert."""

    def __init__(self, pool: ExpertPool, plan: DispatchPlan, repeat: int) -> None:
        self.stacks = pool.stacks()
        self.ids = plan.sorted_ids.repeat_interleave(repeat) if repeat > 1 else plan.sorted_ids
        self.offsets = plan.offsets * repeat
        self.pool = pool

    def conv(self, x: Tensor, weight: str, bias: str | None, geometry: Geometry) -> Tensor:
        raise TypeError("rows of sorted tokens are no grids")

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        stack = self.stacks[weight].to(x.dtype).transpose(-2, -1)
        out: Tensor = _Contiguous.apply(F.grouped_mm(x, stack, offs=self.offsets))
        if bias is not None:
            out = out + self.stacks[bias].to(x.dtype).index_select(0, self.ids)
        return out

    def vector(self, name: str, x: Tensor) -> Tensor:
        return self.stacks[name].to(x.dtype).index_select(0, self.ids)

    def constant(self, name: str) -> Tensor:
        table: Tensor = getattr(self.pool, name)
        return table.index_select(0, self.ids)

    def normalise(self, x: Tensor, momentum: float, eps: float) -> Tensor:
        statistics = Statistics(self.pool.statistics(), self.pool.training, momentum, eps)
        return normalise_segments(x, self.ids, statistics)
