"""What a trained run is worth, in numbers: held-out loss by noise level, distances of samples to
real data with their floors, and what its routers do. The report and the claims read these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.inspect import Trace
from coterie.metrics import NoiseBins
from coterie.train.run import LoadedRun, build_source

LEVELS = 10  # noise levels at which held-out data are looked at


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss (mean over noise levels), per level, and the routings seen on the way."""

    loss: float
    bins: list[dict[str, Any]]
    trace: Trace


def batches(source: Source, size: int, limit: int) -> list[Batch]:
    """The first ``limit`` samples of a source, in order."""
    count = min(limit, len(source))
    return [
        source.get(np.arange(first, min(first + size, count))) for first in range(0, count, size)
    ]


@torch.no_grad()
def held_out(run: LoadedRun, limit: int = 512, size: int = 128) -> HeldOut:
    """Every held-out sample at every one of ``LEVELS`` noise levels, with fixed noise.

    The noise depends on the sample and the level only: two runs on the same data are compared on
    the same noisy inputs. Labels are never dropped.
    """
    source = build_source(run.config, "held_out")
    trace = make_trace(run)
    if run.is_text:
        return _held_out_text(run, source, trace, limit, size)
    process = run.model.process
    bins = NoiseBins(LEVELS)
    objective = run.config.objective.build(run.model)
    for batch in batches(source, size, limit):
        for level in range(LEVELS):
            unit = torch.full((len(batch.ids),), (level + 0.5) / LEVELS)
            t = process.time_of_unit(unit)
            rng = generator(0, "held_out", int(batch.ids[0]), level)
            eps = torch.randn(batch.x.shape, generator=rng)
            x_t = process.diffuse(batch.x, eps, t)
            prediction = run.model(x_t, t, batch.cond, sample_ids=batch.ids)
            bins.add(objective.error(prediction, batch.x, x_t, t), unit)
            trace.add(prediction.routings)
    rows = bins.result()
    return HeldOut(float(np.mean([row["loss"] for row in rows])), rows, trace)


def _held_out_text(run: LoadedRun, source: Source, trace: Trace, limit: int, size: int) -> HeldOut:
    """Bits per token of the objective itself; masked models are averaged over mask shares."""
    objective = run.config.objective.build(run.model)
    masked = run.config.model.masking == "masked"
    bins = NoiseBins(LEVELS)
    total: list[float] = []
    for batch in batches(source, size, limit):
        rng = generator(0, "held_out", int(batch.ids[0]))
        losses = objective(run.model, batch, rng, 1.0)
        total.extend(losses.per_sample.tolist())
        trace.add([routing.detach() for routing in losses.routings])
        if masked:
            bins.add(losses.per_sample, losses.noise)
    rows = bins.result() if masked else []
    return HeldOut(float(np.mean(total)) / float(np.log(2)), rows, trace)


def make_trace(run: LoadedRun) -> Trace:
    backbone = run.config.model.backbone
    return Trace(
        noise_bins=LEVELS,
        noise_to_unit=getattr(getattr(run.model, "process", None), "unit_time", None),
        grid=getattr(backbone, "grid", None),
    )


class StepRecorder:
    """A sampling callback that feeds each step's routings to a trace: conditional and
    unconditional halves are told apart by the labels the routings carry."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __call__(self, step: int, t: Tensor, x: Tensor, prediction: Any) -> None:
        routings: tuple[Routing, ...] = prediction.routings
        if routings:
            self.trace.add_step(step, routings)
