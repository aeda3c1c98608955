"""The data of a report, and checks of their form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coterie.core.cost import Parameters
from coterie.core.errors import DataError, describe
from coterie.inspect.plots.gates import GateMaps
from coterie.inspect.statistics.accumulators import Place
from coterie.inspect.statistics.anomalies import Answers
from coterie.inspect.statistics.compositions import Composed
from coterie.inspect.statistics.routers import FACETS
from coterie.inspect.statistics.trace import Trace


@dataclass(frozen=True, eq=False)
class ReportData:
    """All a report may speak of; only ``title`` is needed, the rest is shown where given."""

    title: str
    recipe: str = ""
    trace: Trace | None = None  # None or empty: a dense model
    loss_bins: Sequence[Mapping[str, Any]] = ()  # {bin, lo, hi, loss, count}
    loss_unit: str = "the units of the training loss"  # of the bins
    curve: Sequence[Mapping[str, Any]] = ()  # records of metrics.jsonl
    # u8 [n, h, w, c] images, float [n, 2] points or [n, P, 3] clouds, or texts
    samples: np.ndarray | Sequence[str] | None = None
    labels: Sequence[int] | None = None  # [n], -1 = unconditional
    class_names: Sequence[str] = ()
    task_names: Sequence[str] = ()
    answers: Mapping[Place, Answers] = field(default_factory=dict)  # of each router's experts
    # facet ("class", "task") -> name -> held-out loss
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    similarity: Mapping[Place, np.ndarray] = field(
        default_factory=dict
    )  # cosines [E, E] of experts
    gate_maps: GateMaps | None = None  # of single pictures
    metrics: Mapping[str, Any] = field(default_factory=dict)  # numbers, or {value, floor, ...}
    parameters: Parameters | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    facets: Sequence[str] = FACETS  # what a row of this model can have; others are not missed
    notes: Sequence[str] = ()  # what a reader must know to read the numbers rightly
    composed: Composed | None = None  # where the model is a composition of trained ones
    particles: Sequence[Mapping[str, Any]] = ()  # ParticleRecord.as_json() of each batch
    citation: str = ""
    hardware: str = ""
    commit: str = ""
    step: int | None = None


def check(data: ReportData) -> None:
    """DataError for samples, labels or loss bins of an unknown form."""
    for index, row in enumerate(data.loss_bins):
        missing = {"lo", "hi", "loss"} - set(row)
        if missing:
            raise DataError(f"loss_bins.{index}: {', '.join(sorted(missing))} missing")
    samples = data.samples
    if isinstance(samples, np.ndarray):
        images = samples.ndim == 4 and samples.dtype == np.uint8 and samples.shape[3] in (1, 3, 4)
        points = samples.ndim == 2 and samples.shape[1] == 2
        clouds = samples.ndim == 3 and samples.shape[2] == 3 and samples.shape[1] > 0
        if not images and not points and not clouds:
            found = f"{samples.dtype} {samples.shape}"
            allowed = "uint8 [n, h, w, 1|3|4], float [n, 2] or float [n, P, 3]"
            raise DataError(describe("samples", found, allowed))
    elif samples is not None and not all(isinstance(text, str) for text in samples):
        raise DataError(describe("samples", type(samples).__name__, "an array or strings"))
    if data.labels is not None and samples is not None and len(data.labels) != len(samples):
        raise DataError(describe("labels", len(data.labels), f"{len(samples)}, one per sample"))
