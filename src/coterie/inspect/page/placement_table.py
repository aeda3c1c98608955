"""Experts on many devices as files: the simulated steps as numbers and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from coterie.core.machine import commit, hardware_line
from coterie.core.outputs import Outputs, pair_at
from coterie.inspect.plots.device_placement import draw_placement
from coterie.inspect.statistics.device_placement import RowCost
from coterie.inspect.statistics.device_steps import simulate
from coterie.inspect.statistics.routers import RouterStats


def placement_outputs(folder: str | Path) -> Outputs:
    """Where the files go, looked at before any work."""
    return pair_at(folder, "placement", "cost")


def write_placement(
    origin: str,
    routers: Sequence[RouterStats],
    cost: RowCost,
    devices: Sequence[int],
    tokens: int,
    spare: int,
    outputs: Outputs,
) -> Path:
    """Simulate and write the numbers and the picture; the path of the former."""
    rows = [row for count in devices for row in simulate(routers, count, tokens, spare, cost)]
    result = {
        "run": origin,
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
