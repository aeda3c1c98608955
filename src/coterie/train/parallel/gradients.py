"""Gradients of the whole batch from those of its parts: the mean over all processes, of which most
are on their way while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from coterie.train.parallel.layout import Cut, Layout
from coterie.train.parallel.processes import Processes

LEAST, MOST = 2**18, 2**23
"""Numbers in one message: an eighth of all, within these bounds."""


class GradientMean:
    """Averages gradients over the processes that have the same parameter.

    An expert has the gradients of rows from all of its group, added up, where the mean over as many
    processes is wanted. Where some process has no gradient its part of the mean is 0; where none
    has one, there is none after it. Messages are sent in one order, that in which backward passes
    mostly meet the parameters; one that waits for a gradient holds up those behind it, and none
    waits for longer than the backward pass.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes
    ) -> None:
        self._buckets: list[_Bucket] = []
        self._alone: list[tuple[list[nn.Parameter], int]] = []
        self._open = False  # whether the next gradients are complete
        config = processes.config
        for cut, members in by_cut(parameters, layout).items():
            axes = [("data", True), ("shard", not cut.shard), ("expert", not cut.expert)]
            group = tuple(axis for axis, averaged in axes if averaged)
            parts = config.data * config.expert * (1 if cut.shard else config.shard)
            if group in processes.groups:
                for together in buckets(members[::-1]):
                    self._buckets.append(_Bucket(together, group, parts, processes))
            elif parts > 1:
                self._alone.append((members, parts))
        place = {parameter: number for number, parameter in enumerate(parameters.values())}
        self._buckets.sort(key=lambda bucket: -min(place[p] for p in bucket.members))
        self._next = 0
        for bucket in self._buckets:
            for number, parameter in enumerate(bucket.members):
                parameter.register_post_accumulate_grad_hook(self._hook(bucket, number))

    def start(self) -> None:
        """The next backward pass completes the gradients."""
        self._next, self._open = 0, True
        for bucket in self._buckets:
            bucket.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, wait for all, and leave the means in the parameters."""
        self._open = False
        for bucket in self._buckets:
            bucket.fill()
        self._send(everything=True)
        for bucket in self._buckets:
            bucket.receive()
        for members, parts in self._alone:
            torch._foreach_div_([p.grad for p in members if p.grad is not None], parts)

    def _hook(self, bucket: _Bucket, number: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._open:
                bucket.put(number)
                self._send()

        return hook

    def _send(self, everything: bool = False) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.missing and not everything:
                break
            bucket.send()
            self._next += 1


class _Bucket:
    """One message: the gradients of some parameters, and which of them there are."""

    def __init__(
        self,
        members: list[nn.Parameter],
        group: tuple[str, ...],
        parts: int,
        processes: Processes,
    ) -> None:
        self.members = members
        self._group, self._parts, self._processes = group, parts, processes
        sizes = [parameter.numel() for parameter in members]
        self._flat = members[0].detach().new_empty(sum(sizes) + len(members))
        *flats, self._there = self._flat.split([*sizes, len(members)])
        self._views = [flat.view_as(parameter) for flat, parameter in zip(flats, members)]
        self.missing: set[int] = set()
        self._wait: Callable[[], object] = lambda: None

    def clear(self) -> None:
        """Before the gradients of a step."""
        self.missing = set(range(len(self.members)))
        self._there.fill_(1)

    @torch.no_grad()
    def put(self, number: int) -> None:
        """The gradient of a parameter is complete; it lives in the message from now on."""
        parameter, view = self.members[number], self._views[number]
        assert parameter.grad is not None
        torch.div(parameter.grad, self._parts, out=view)
        parameter.grad = view
        self.missing.remove(number)

    def fill(self) -> None:
        """Put what has come by another way than a backward pass, and zeros where nothing has."""
        for number in sorted(self.missing):
            if self.members[number].grad is not None:
                self.put(number)
            else:
                self._views[number].zero_()
                self._there[number] = 0

    def send(self) -> None:
        self._wait = self._processes.reducing(self._flat, self._group)

    def receive(self) -> None:
        self._wait()
        if self.missing:
            there = self._there.tolist()
            for number in self.missing:
                self.members[number].grad = self._views[number] if there[number] else None


def by_cut(parameters: Mapping[str, nn.Parameter], layout: Layout) -> dict[Cut, list[nn.Parameter]]:
    """In an order that is the same in every process."""
    found: dict[Cut, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault(layout.of(name), []).append(parameter)
    return {cut: found[cut] for cut in sorted(found)}


def total_norm(
    parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes
) -> Tensor:
    """Norm of all gradients, in float32, each counted once; at most one message."""
    config = processes.config
    total = torch.zeros((), device=next(iter(parameters.values())).device)
    cuts = by_cut(parameters, layout)
    apart = any(cut.shard or cut.expert for cut in cuts)
    for cut, members in cuts.items():
        gradients = [p.grad for p in members if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).float().square().to(total.device)
        places = (config.shard if cut.shard else 1) * (config.expert if cut.expert else 1)
        # Others have the same gradients, which all add below.
        total = total + (square * (places / config.processes) if apart else square)
    return (processes.reduce(total) if apart else total).sqrt()


def buckets(parameters: Collection[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, together up to a size; the same in every process."""
    limit = min(MOST, max(LEAST, sum(parameter.numel() for parameter in parameters) // 8))
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in members:
            if bucket and size + parameter.numel() > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket
