"""A batch that several processes share, each holding an equal run of its samples.

Inside :func:`sharing`, what is drawn for a batch is drawn for the whole of it and cut, and what is
summed over a batch is summed over all processes: so every process computes with its own samples
what one process would compute with all of them. Outside, every function here is the identity.

The loss of the whole batch is the mean of the processes' losses, and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

Reduction = Literal["sum", "max"]


@dataclass(frozen=True)
class Share:
    """The ``rank``-th of ``count`` equal parts; ``reduce`` adds up (or takes the largest of) a
    tensor over all parts, in place, without gradient."""

    rank: int
    count: int
    reduce: Callable[[Tensor, Reduction], Tensor]


_share: ContextVar[Share | None] = ContextVar("coterie_share", default=None)


@contextmanager
def sharing(share: Share) -> Iterator[None]:
    """Inside the block this process holds one part of each batch."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def whole(rows: int) -> int:
    """Rows of the whole batch where this process holds ``rows``."""
    share = _share.get()
    return rows if share is None else rows * share.count


def own(values: Tensor) -> Tensor:
    """This process's rows of values [rows of the whole batch, ...], sample after sample."""
    share = _share.get()
    return values if share is None else values.chunk(share.count)[share.rank]


def uniform(shape: Sequence[int], rng: Generator) -> Tensor:
    """f32 [rows, ...] in [0, 1) on the device of ``rng``, drawn for the whole batch."""
    full = (whole(shape[0]), *shape[1:])
    return own(torch.rand(full, generator=rng, device=rng.device))


def normal(shape: Sequence[int], rng: Generator) -> Tensor:
    """Standard normal f32 [rows, ...] on the device of ``rng``, drawn for the whole batch."""
    full = (whole(shape[0]), *shape[1:])
    return own(torch.randn(full, generator=rng, device=rng.device))


def summed(*values: Tensor) -> tuple[Tensor, ...]:
    """Each tensor added up over all processes, in one message, with gradient.

    The gradient holds where what is made of the sums is the same in every process, as a statistic
    of the whole batch is; the tensors are of one floating type.
    """
    share = _share.get()
    if share is None or not values:
        return values
    flat: Tensor = _Summed.apply(torch.cat([value.flatten() for value in values]), share)
    parts = flat.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values))


def over_batch(sums: Tensor, counts: Tensor) -> Tensor:
    """``sums / counts`` where both are of the whole batch, as a part of which the processes' mean
    is that: own sums over the mean of all counts, at least 1 in all."""
    (total,) = summed(counts.to(sums.dtype))
    return over_total(sums, total)


def over_total(sums: Tensor, total: Tensor) -> Tensor:
    """As :func:`over_batch`, where ``total`` is the count of the whole batch already."""
    share = _share.get()
    return (sums if share is None else sums * share.count) / total.clamp_min(1)


def largest(value: int, device: torch.device | str = "cpu") -> int:
    """The largest of the processes' numbers."""
    share = _share.get()
    if share is None:
        return value
    return int(share.reduce(torch.tensor([value], device=device), "max"))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: Share) -> Tensor:
        ctx.count = share.count
        return share.reduce(values.detach().clone(), "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every process has this very gradient, and their mean is taken at the end.
        return grad * ctx.count, None
