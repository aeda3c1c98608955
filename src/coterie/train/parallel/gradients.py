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
    of its group, added up, where the mean over as many processes is wanted.
    """
    _fill(parameters, layout, processes)
    config = processes.config
    kinds: dict[Cut, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            kinds.setdefault(layout.of(name), []).append(parameter.grad)
    for cut in sorted(kinds):
        axes = [("data", True), ("shard", not cut.shard), ("expert", not cut.expert)]
        group = tuple(axis for axis, averaged in axes if averaged)
        parts = config.data * config.expert * (1 if cut.shard else config.shard)
        for bucket in buckets(kinds[cut]):
            if group not in processes.groups:
                torch._foreach_div_(bucket, parts)
                continue
            flat = torch.cat([value.flatten() for value in bucket])
            processes.reduce(flat, "sum", group).div_(parts)
            means = flat.split([value.numel() for value in bucket])
            torch._foreach_copy_(bucket, [m.view(v.shape) for m, v in zip(means, bucket)])


def _fill(parameters: Mapping[str, nn.Parameter], layout: Layout, processes: Processes) -> None:
    """Zeros where another process has a gradient and this one has none."""
    same = [parameter for name, parameter in parameters.items() if not layout.of(name).expert]
    if not same:
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in same])
    for parameter, known in zip(same, processes.reduce(has, "max").tolist()):
        if known and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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


def buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type and device, together up to a size."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in gradients:
        kinds.setdefault((value.dtype, value.device), []).append(value)
    for values in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for value in values:
            if bucket and size + value.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(value)
            size += value.numel()
        yield bucket
