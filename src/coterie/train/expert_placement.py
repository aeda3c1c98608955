"""Experts of a run on many devices, simulated: its routing loads, and what a row costs here."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coterie.core.errors import ConfigError, describe
from coterie.core.machine import commit, hardware_line
from coterie.core.outputs import pair_at
from coterie.experts import ExpertLayer
from coterie.inspect.placement import STRATEGIES, RowCost, fit_cost, strategies
from coterie.inspect.plots.placement import draw_placement
from coterie.inspect.routers import RouterStats, analyse
from coterie.train.judges import judge_of
from coterie.train.run import load_run

ROWS = (64, 256, 1024)  # of one expert, at which its cost is measured
REPEATS = 7


def place_run(
    path: str | Path,
    devices: Sequence[int],
    tokens: int = 4096,
    spare: int = 1,
    out: str | Path | None = None,
) -> Path:
    """Simulate a step of ``tokens`` tokens per device and write ``placement.json`` and ``.png``;
    returns the former.

    Loads are those of held-out data, layer by layer; a step lasts the sum over layers of their
    busiest device. ConfigError for a run without token routers.
    """
    run = load_run(path)
    outputs = pair_at(out if out is not None else run.path / "placement", "placement", "cost")
    routers = [r for r in analyse(judge_of(run).held_out().trace) if r.unit == "token"]
    layers = [m for m in run.model.modules() if isinstance(m, ExpertLayer)]
    if not routers or not layers:
        raise ConfigError(describe("run", str(path), "a run whose routers choose for tokens"))
    cost = measured_cost(layers[0])
    rows = [row for count in devices for row in simulate(routers, count, tokens, spare, cost)]
    result = {
        "run": str(path),
        "commit": commit(),
        "hardware": hardware_line(),
        "tokens_per_device": tokens,
        "spare_places": spare,
        "cost": asdict(cost),
        "layers": [{"name": r.name, "load": [round(float(v), 6) for v in r.load]} for r in routers],
        "rows": rows,
    }
    with outputs.writing() as work:
        draw_placement(rows, work / "placement.png")
        (work / outputs.index).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return outputs.folder / outputs.index


def simulate(
    routers: Sequence[RouterStats], devices: int, tokens: int, spare: int, cost: RowCost
) -> list[dict[str, Any]]:
    """One row per strategy; ``efficiency`` is the ideal time over the simulated one."""
    seconds = dict.fromkeys(STRATEGIES, 0.0)
    held, ideal = dict.fromkeys(STRATEGIES, 0), 0.0
    for router in routers:
        total = tokens * devices * router.choices_per_row
        for name, placed in strategies(np.asarray(router.load) * total, devices, spare).items():
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
def measured_cost(layer: ExpertLayer) -> RowCost:
    """Forward time of one expert on this device, as a line over its rows (median of repeats)."""
    expert: nn.Module = layer.pool.unpack()[0]
    rng = torch.Generator().manual_seed(0)
    device = next(layer.parameters()).device
    seconds = []
    for count in ROWS:
        x = torch.randn(count, layer.width, generator=rng).to(device)
        expert(x)
        found = []
        for _ in range(REPEATS):
            start = time.process_time()
            for _ in range(8):
                expert(x)
            found.append((time.process_time() - start) / 8)
        seconds.append(statistics.median(found))
    return fit_cost(ROWS, seconds)
