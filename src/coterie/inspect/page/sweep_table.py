"""A sweep over routing settings as files: its rows as numbers and as a picture."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.core.machine import commit, hardware
from coterie.core.outputs import Outputs, pair_at
from coterie.inspect.plots.style import render
from coterie.inspect.plots.sweep import plot_sweep
from coterie.inspect.statistics.sweep import SweepRow


def write_rows(rows: Sequence[SweepRow], about: Mapping[str, Any], unit: str, folder: Path) -> Path:
    """Write ``<paths>.json`` and the picture ``<paths>.png``; the path of the picture. ``about``:
    of what, ``unit``: of the loss."""
    outputs = sweep_outputs(folder, rows[0].settings)
    name = outputs.index.removesuffix(".json")
    data = {
        **about,
        "loss_unit": unit,
        "commit": commit(),
        "hardware": hardware(),
        "rows": [vars(row) for row in rows],
    }
    plot = plot_sweep([vars(row) for row in rows], unit)
    with outputs.writing() as work:
        (work / outputs.index).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (work / f"{name}.png").write_bytes(render(plot).light)
    return outputs.folder / f"{name}.png"


def sweep_outputs(folder: str | Path, paths: Collection[str]) -> Outputs:
    """Where the files of a sweep over ``paths`` go, looked at before anything is evaluated."""
    return pair_at(folder, "_".join(paths), "loss_unit")
