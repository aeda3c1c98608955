"""Which tiles a device is fastest with: one product of a call at a time, one size of its tile at a
time, from what the rules of ``experts/dispatch/triton/tiles.py`` choose."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from coterie.bench.expert_cases import Case, Setup
from coterie.bench.gpu_clock import Clock
from coterie.bench.gpu_peers import reason
from coterie.bench.gpu_speed import OURS
from coterie.bench.timing import Place

CHOICES: dict[str, tuple[int, ...]] = {
    "columns": (64, 128, 256),
    "depth": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
}


def tune(case: Case, device: str, dtype: torch.dtype, clock: Clock) -> dict[str, Any]:
    """Milliseconds of forward, and of forward and backward, with each variant, and the best tile of
    each product: lines for ``tiles.MEASURED``."""
    setup = Setup(case, Place(device, dtype))
    calls = setup.backends()
    if OURS not in calls:
        return {"missing": {OURS: "no CUDA device, or triton is not installed"}, "rows": []}
    from coterie.experts.dispatch.triton import tiles

    call, clock = calls[OURS], replace(clock, repeats=20, warmups=3, seconds=2.0)

    def step() -> None:
        torch.autograd.grad(call.run(), call.leaves, setup.grad)

    def milliseconds(role: str) -> float:
        run = torch.no_grad()(call.run) if role in tiles.ROLES[:2] else step
        return 1e3 * statistics.median(clock.times({role: run})[role])

    rows: list[dict[str, Any]] = []
    for role, key, start in _products(case, setup.x.itemsize):
        tiles.MEASURED.pop(key, None)
        best, least = start, milliseconds(role)
        rows.append({"role": role, "key": key, "blocks": start, "ms": least})
        for blocks in _variants(start):
            tiles.MEASURED[key] = blocks
            try:
                found = milliseconds(role)
            except Exception as problem:  # too much shared memory, say
                rows.append({"role": role, "key": key, "blocks": blocks, "why": reason(problem)})
                continue
            rows.append({"role": role, "key": key, "blocks": blocks, "ms": found})
            if found < least:
                best, least = blocks, found
        tiles.MEASURED[key] = best  # the next product is tuned with this one
        rows.append({"role": role, "key": key, "blocks": best, "ms": least, "best": True})
    return {"rows": rows, "dtype": str(dtype)}


def _products(case: Case, itemsize: int) -> Iterator[tuple[str, tuple[str, int, int, int], Any]]:
    """Role, key in the table, and what the rules choose, of each product of a SwiGLU layer."""
    from coterie.experts.dispatch.triton.tiles import row_block, row_blocks, weight_blocks

    rows = row_block(case.tokens * case.top_k, case.num_experts)
    sizes = {
        "hidden": (case.hidden, case.width, 2),
        "answer": (case.width, case.hidden, 1),
        "hidden_grad": (case.hidden, case.width, 2),
        "row_grad": (case.width, 2 * case.hidden, 1),
    }
    for role, (columns, depth, halves) in sizes.items():
        key = (role, columns, depth, itemsize)
        yield role, key, row_blocks(role, rows, columns, depth, itemsize, halves)
    for height, width in ((case.width, case.hidden), (2 * case.hidden, case.width)):
        key = ("weight_grad", height, width, itemsize)
        yield "weight_grad", key, weight_blocks(height, width, itemsize)


def _variants(start: Any) -> Iterator[Any]:
    for field, values in CHOICES.items():
        for value in values:
            if value != getattr(start, field):
                yield start._replace(**{field: value})
