"""A batch in equal parts: one part per process, or several parts (micro-batches) in turn.

Inside :func:`sharing`, random numbers for a batch are drawn for the whole batch and cut, and sums
over a batch run over all its parts. So each part computes what it would in one large batch. Outside
:func:`sharing` every function here is the identity. Code that draws random numbers or sums over
rows in training uses these functions; the generator is the same in all parts.

The loss of the whole batch is the mean of the parts' losses; its gradient is the mean of theirs.

Processes exchange sums as they compute. Micro-batches (:class:`Turns`) first run a forward pass
without gradients to obtain their sums.
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
    """Which part of the batch this process holds: number ``rank`` of ``count`` equal parts.

    ``reduce`` sums (or takes the maximum of) a tensor over all parts, in place, without gradient.
    ``returns`` is called before a sum whose result changes the model's activations.
    """

    rank: int
    count: int
    reduce: Callable[[Tensor, Reduction], Tensor]
    returns: Callable[[], None] = lambda: None


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
    """Number of rows of the whole batch, if this part holds ``rows``."""
    share = _share.get()
    return rows if share is None else rows * share.count


def own(values: Tensor) -> Tensor:
    """The rows of this part, of ``values`` [rows of the whole batch, ...] in sample order."""
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


def summed(*values: Tensor, returns: bool = False) -> tuple[Tensor, ...]:
    """Each tensor summed over all parts, in one message, with gradient.

    The gradient is right where the result of the sums is the same in every part, as a statistic of
    the whole batch is. All tensors have one floating type. ``returns``: the result changes the
    model's activations, so that later sums depend on it.
    """
    share = _share.get()
    if share is None or not values:
        return values
    if returns:
        share.returns()
    flat: Tensor = _Summed.apply(torch.cat([value.flatten() for value in values]), share)
    parts = flat.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values))


def over_batch(sums: Tensor, counts: Tensor) -> Tensor:
    """``sums / counts`` of the whole batch, as this part's share: the mean over parts is that
    ratio.

    The part's own sums are divided by the mean count of all parts (at least 1 in total).
    """
    (total,) = summed(counts.to(sums.dtype))
    return over_total(sums, total)


def over_total(sums: Tensor, total: Tensor) -> Tensor:
    """As :func:`over_batch`, where ``total`` already is the count of the whole batch."""
    share = _share.get()
    return (sums if share is None else sums * share.count) / total.clamp_min(1)


def largest(value: int, device: torch.device | str = "cpu") -> int:
    """The largest of the parts' values."""
    share = _share.get()
    if share is None:
        return value
    share.returns()
    return int(share.reduce(torch.tensor([value], device=device), "max"))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: Share) -> Tensor:
        ctx.count = share.count
        return share.reduce(values.detach().clone(), "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every part has this very gradient, and their mean is taken at the end.
        return grad * ctx.count, None


class Turns:
    """The ``count`` micro-batches of one step, which this process runs one after the other.

    :meth:`count_first` runs each without gradients and keeps its sums. Then, inside :meth:`part`,
    sums are those over all micro-batches. Inside :func:`sharing` of several processes each
    micro-batch is cut again, and sums are over all processes too.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = False
        """Whether a part has asked for a sum that was not counted before."""
        self._known: list[list[Tensor]] = [[] for _ in range(count)]
        self._said: list[Tensor] = []
        self._returning = 0

    def count_first(self, run: Callable[[int], object]) -> bool:
        """Call ``run(n)`` for every micro-batch n until its sums are known; returns whether the
        model computes any sums."""
        passes = 0
        while True:
            self._returning = 0
            said = []
            for turn in range(self.count):
                with torch.no_grad(), self.part(turn):
                    run(turn)
                said.append(self._said)
            before, self._known = self._known, said
            passes += 1
            # What goes back into the model may change the sums after it: each pass settles one.
            if passes > self._returning // self.count or _same(before, said):
                self.asked = False
                return bool(said[0])

    @contextmanager
    def part(self, turn: int) -> Iterator[None]:
        """Inside the block this process holds micro-batch number ``turn``."""
        outer = _share.get() or Share(0, 1, lambda values, how: values)
        self._said = []

        def reduce(values: Tensor, how: Reduction) -> Tensor:
            own = outer.reduce(values, how)
            number = len(self._said)
            self._said.append(own.clone())
            others = [
                said[number]
                for other, said in enumerate(self._known)
                if other != turn and number < len(said)
            ]
            if len(others) < self.count - 1:
                self.asked = True
                return own
            # In the order of the parts, so that every part has the same sum to the bit.
            stacked = torch.stack([*others[:turn], own, *others[turn:]])
            return stacked.sum(0) if how == "sum" else stacked.amax(0)

        def returns() -> None:
            self._returning += 1

        rank, count = turn * outer.count + outer.rank, self.count * outer.count
        with sharing(Share(rank, count, reduce, returns)):
            yield


def _same(before: list[list[Tensor]], after: list[list[Tensor]]) -> bool:
    return all(
        len(old) == len(new) and all(torch.equal(one, two) for one, two in zip(old, new))
        for old, new in zip(before, after)
    )
