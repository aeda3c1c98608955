"""Gradients summed over processes, mostly while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from coterie.train.parallel.layout import Cut, Layout
from coterie.train.parallel.processes import Processes

LEAST, MOST = 2**19, 2**23
"""Numbers in one message: an eighth of all, within these bounds."""


class GradientSum:
    """Adds gradients up over the processes that have the same parameter.

    Every process goes back from its part of the loss, so the sum is the gradient of the whole; an
    expert has those of rows from all of its group already. Where some process has no gradient its
    part of the sum is 0; where none has one, there is none after it. Messages are sent in one
    order, that in which backward passes mostly meet the parameters; one that waits for a gradient
    holds up those behind it, and none waits for longer than the backward pass. A message is dear
    however short it is, so what processes have to say besides travels with the first one that goes
    to all of them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes
    ) -> None:
        self._buckets: list[_Bucket] = []
        self._open = False  # whether the next gradients are complete
        for cut, members in by_cut(parameters, layout).items():
            axes = [("data", True), ("shard", not cut.shard), ("expert", not cut.expert)]
            group = tuple(axis for axis, whole in axes if whole)
            if group in processes.groups:
                for together in buckets(members[::-1]):
                    self._buckets.append(_Bucket(together, group, processes))
        place = {parameter: number for number, parameter in enumerate(parameters.values())}
        self._buckets.sort(key=lambda bucket: -min(place[p] for p in bucket.members))
        self._next = 0
        self._carrier = next((b for b in self._buckets if b.carries), None)
        self._processes = processes
        self._said: Callable[[], Tensor] = lambda: torch.empty(0)
        for bucket in self._buckets:
            for parameter in bucket.members:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def start(self, said: Tensor) -> None:
        """The next backward pass completes the gradients; ``said`` f32 [N] is for all processes."""
        self._next, self._open = 0, True
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)
        if self._carrier is None:
            self._said = self._processes.joining(said[None])
        else:
            self._said = self._carrier.carry(said)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Send what is left, wait for all, and leave the sums in the parameters. What each process
        said, f32 [P, N]."""
        self._open = False
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()
        return self._said()

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._open:
                bucket.missing -= 1
                if not bucket.missing:
                    self._send()

        return hook

    @torch.no_grad()
    def _send(self) -> None:
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].send()
            self._next += 1


class _Bucket:
    """One message: the gradients of some parameters, and which of them there are."""

    def __init__(
        self, members: list[nn.Parameter], group: tuple[str, ...], processes: Processes
    ) -> None:
        self.members = members
        self.missing = 0
        """Gradients that the backward pass has not met; some come by another way, or never."""
        self._group, self._processes = group, processes
        self._lay_out(0)
        self._absent: list[int] = []
        self._wait: Callable[[], object] = lambda: None

    @property
    def carries(self) -> bool:
        """Whether it can carry what is said to all processes."""
        return self._group == self._processes.config.axes and self._flat.dtype == torch.float32

    def _lay_out(self, said: int) -> None:
        sizes = [parameter.numel() for parameter in self.members]
        rows = self._processes.config.processes
        own = [*sizes, len(self.members), rows * said]
        self._flat = self.members[0].detach().new_empty(sum(own))
        *flats, self._there, carried = self._flat.split(own)
        self._views = [flat.view_as(parameter) for flat, parameter in zip(flats, self.members)]
        self._carried = carried.view(rows, said)

    def carry(self, said: Tensor) -> Callable[[], Tensor]:
        """Rows are added up where all but one are 0; read when the message has come."""
        if len(said) != self._carried.shape[1]:
            self._lay_out(len(said))
        self._carried.zero_()
        self._carried[self._processes.rank] = said
        return lambda: self._carried.clone()

    def send(self) -> None:
        """Gradients live in the message from now on."""
        self._absent = [n for n, parameter in enumerate(self.members) if parameter.grad is None]
        here = [(v, p.grad) for v, p in zip(self._views, self.members) if p.grad is not None]
        if here:
            torch._foreach_copy_([view for view, _ in here], [grad for _, grad in here])
        self._there.fill_(1)
        for number in self._absent:
            self._views[number].zero_()
            self._there[number] = 0
        for parameter, view in zip(self.members, self._views):
            parameter.grad = view
        self._wait = self._processes.reducing(self._flat, self._group)

    def receive(self) -> None:
        self._wait()
        if self._absent:
            there = self._there.tolist()
            for number in self._absent:
                if not there[number]:
                    self.members[number].grad = None


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
