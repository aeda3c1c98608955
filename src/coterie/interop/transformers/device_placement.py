"""Experts of a Hugging Face MoE model on many devices, by its routing loads on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.inspect import Trace, analyse
from coterie.inspect.page.placement_table import placement_outputs, write_placement
from coterie.inspect.statistics.device_steps import measured_cost
from coterie.interop.transformers.losses import LEVELS
from coterie.interop.transformers.report import Reading
from coterie.interop.transformers.sites import find_moe_layers


def place_model(
    reading: Reading,
    devices: Sequence[int],
    tokens: int = 4096,
    spare: int = 1,
    out: str | Path | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Path:
    """As :func:`coterie.runs.measure.device_placement.place_run`, of a model that reads a text."""
    outputs = placement_outputs(out if out is not None else reading.folder.path / "placement")
    trace = Trace(noise_bins=LEVELS)
    for chosen, _ in reading.answers(trace):
        if progress is not None:
            progress(len(chosen))
    site = find_moe_layers(reading.model)[0]
    gate, up, down = site.expert(0)
    act: Callable[[Tensor], Tensor] = site.experts.act_fn

    def expert(x: Tensor) -> Tensor:
        return (act(x @ gate.T) * (x @ up.T)) @ down.T

    cost = measured_cost(expert, site.width, gate)
    routers = [router for router in analyse(trace) if router.unit == "token"]
    origin = str(reading.folder.path)
    return write_placement(origin, routers, cost, devices, tokens, spare, outputs)
