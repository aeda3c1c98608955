"""Simulated placement of a run's experts on many devices, from its routing loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coterie.core.errors import ConfigError, describe
from coterie.experts import ExpertLayer
from coterie.inspect.page.placement_table import placement_outputs, write_placement
from coterie.inspect.statistics.device_steps import measured_cost
from coterie.inspect.statistics.routers import analyse
from coterie.runs.judges import judge_of
from coterie.runs.trained_run import load_run


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
    outputs = placement_outputs(out if out is not None else run.path / "placement")
    routers = [r for r in analyse(judge_of(run).held_out().trace) if r.unit == "token"]
    layers = [m for m in run.model.modules() if isinstance(m, ExpertLayer)]
    if not routers or not layers:
        raise ConfigError(describe("run", str(path), "a run whose routers choose for tokens"))
    layer = layers[0]
    cost = measured_cost(layer.pool.unpack()[0], layer.width, next(layer.parameters()))
    return write_placement(str(path), routers, cost, devices, tokens, spare, outputs)
