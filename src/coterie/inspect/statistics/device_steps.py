"""What a step of expert-parallel layers lasts: simulated from loads and the cost of a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.inspect.statistics.device_placement import STRATEGIES, RowCost, fit_cost, strategies
from coterie.inspect.statistics.routers import RouterStats

ROWS = (64, 256, 1024)  # of one expert, at which its cost is measured
REPEATS = 7


def simulate(
    routers: Sequence[RouterStats], devices: int, tokens: int, spare: int, cost: RowCost
) -> list[dict[str, Any]]:
    """One row per strategy; ``efficiency`` is the ideal time over the simulated one."""
    seconds = dict.fromkeys(STRATEGIES, 0.0)
    held, ideal = dict.fromkeys(STRATEGIES, 0), 0.0
    for router in routers:
        total = tokens * devices * router.choices_per_row
        for name, placed in strategies(
            np.asarray(router.load) * total, devices, spare, cost
        ).items():
            seconds[name] += float(cost.seconds(placed).max())
            held[name] = max(held[name], int(placed.held.max()))
        ideal += cost.per_row * total / devices
    return [
        {
            "devices": devices,
            "strategy": name,
            "step_ms": round(1e3 * seconds[name], 4),
            "ideal_ms": round(1e3 * ideal, 4),
            "efficiency": round(ideal / seconds[name], 4),
            "experts_per_device": held[name],
        }
        for name in STRATEGIES
    ]


@torch.no_grad()
def measured_cost(expert: Callable[[Tensor], object], width: int, like: Tensor) -> RowCost:
    """Forward time of one expert on this device, as a line over its rows (median of repeats).
    ``like``: a tensor on the device and of the type of what it reads."""
    rng = torch.Generator().manual_seed(0)
    seconds = []
    for count in ROWS:
        x = torch.randn(count, width, generator=rng).to(like)
        expert(x)
        found = []
        for _ in range(REPEATS):
            start = time.process_time()
            for _ in range(8):
                expert(x)
            found.append((time.process_time() - start) / 8)
        seconds.append(statistics.median(found))
    return fit_cost(ROWS, seconds)
