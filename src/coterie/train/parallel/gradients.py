"""Gradients of the whole batch from those of its parts: the mean over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from coterie.train.parallel.layout import Cut, Layout
from coterie.train.parallel.processes import Processes

BUCKET = 2**23
"""Numbers in one message."""


@torch.no_grad()
def average(parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes) -> None:
    """Average gradients over the processes that have the same parameter.

    Shards have been averaged by their own exchange. An expert has the gradients of rows from all
    of its group, added up, where the mean over as many processes is wanted. Where some process has
    no gradient its part of the mean is 0; where none has one, there is none after it.
    """
    config = processes.config
    kinds: dict[Cut, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kinds.setdefault(layout.of(name), []).append(parameter)
    for cut in sorted(kinds):
        axes = [("data", True), ("shard", not cut.shard), ("expert", not cut.expert)]
        group = tuple(axis for axis, averaged in axes if averaged)
        parts = config.data * config.expert * (1 if cut.shard else config.shard)
        if group in processes.groups:
            for bucket in buckets(kinds[cut]):
                _average(bucket, group, parts, processes)
        elif parts > 1:
            torch._foreach_div_([p.grad for p in kinds[cut] if p.grad is not None], parts)


def _average(
    bucket: list[nn.Parameter], group: tuple[str, ...], parts: int, processes: Processes
) -> None:
    """One message: every gradient, and which of them there are."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    has = gradients[0].new_tensor([float(p.grad is not None) for p in bucket])
    flat = torch.cat([*(value.flatten() for value in gradients), has])
    processes.reduce(flat, "sum", group)
    *sums, known = flat.split([*(value.numel() for value in gradients), len(bucket)])
    torch._foreach_div_(sums, parts)
    torch._foreach_copy_(gradients, [s.view(v.shape) for s, v in zip(sums, gradients)])
    for parameter, gradient, some in zip(bucket, gradients, known.tolist()):
        parameter.grad = gradient if some else None


def total_norm(
    parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes
) -> Tensor:
    """Norm of all gradients, in float32, each counted once."""
    kinds: dict[Cut, list[Tensor]] = {}
    for name, parameter in parameters.items():
        found = kinds.setdefault(layout.of(name), [])
        if parameter.grad is not None:
            found.append(parameter.grad)
    total = torch.zeros((), device=next(iter(parameters.values())).device)
    for cut in sorted(kinds):
        square = torch.nn.utils.get_total_norm(kinds[cut]).float().square().to(total.device)
        for axis, on in (("shard", cut.shard), ("expert", cut.expert)):
            square = processes.reduce(square, "sum", (axis,)) if on else square
        total = total + square
    return total.sqrt()


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, together up to a size; the same in every process."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in members:
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket
