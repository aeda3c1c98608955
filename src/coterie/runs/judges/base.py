"""Base of judges: the evaluation of runs of one modality.

A judge computes the held-out loss, and draws, scores, plots and writes samples. Reports, claims,
sampling and probes use the judge of a run and are themselves independent of the modality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator

from coterie.core.batch import Batch, Losses, Source
from coterie.core.errors import ConfigError, unknown
from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.data import order
from coterie.inspect import Trace, label_name
from coterie.metrics import NoiseBins
from coterie.runs.build import build_source
from coterie.runs.sample.sampling import Samples, conditional, generate
from coterie.runs.trained_run import LoadedRun

LEVELS = 10  # noise levels at which held-out data are looked at


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss (mean over noise levels), loss per level, routings, and loss per class.

    ``by_class``: the losses per class that the judge reports.
    """

    loss: float
    bins: list[dict[str, Any]]
    trace: Trace
    by_class: dict[str, float] = field(default_factory=dict)
    class_losses: dict[str, float] = field(default_factory=dict)


class Judge:
    """A judge whose held-out loss is the objective's, per sample, in its unit."""

    scale: ClassVar[float] = 1.0  # held-out loss = scale * objective's
    steps: ClassVar[bool] = False  # whether sampling is a walk whose routing can be followed
    draws: ClassVar[bool] = True  # whether there are samples to look at

    def __init__(self, run: LoadedRun) -> None:
        self.run = run
        self.objective: Any = run.config.objective.build(run.model)

    def unit(self) -> str:
        """Unit of the held-out loss."""
        return str(self.run.config.objective.kind)

    def ask(self, batch: Batch, rng: Generator) -> Losses:
        """The objective's losses on one batch."""
        losses: Losses = self.objective(self.run.model, batch, rng, 1.0)
        return losses

    def probe(self, batch: Batch) -> tuple[float, tuple[Routing, ...]]:
        """Loss and routings on a batch, always with the same noise."""
        losses = self.ask(batch, generator(0, "probe"))
        assert losses.per_sample is not None
        return float(losses.per_sample.mean()), losses.routings

    @torch.no_grad()
    def held_out(self, limit: int = 512, size: int = 128) -> HeldOut:
        """Loss on ``limit`` held-out samples, always the same, with fixed noise."""
        source, trace = build_source(self.run.config, "held_out"), make_trace(self.run)
        bins = NoiseBins(LEVELS)
        total: list[float] = []
        labels: list[int] = []
        for batch in batches(source, size, limit):
            losses = self.ask(batch, generator(0, "held_out", int(batch.ids[0])))
            assert losses.per_sample is not None
            total.extend(losses.per_sample.tolist())
            if batch.cond.label is not None:
                labels.extend(batch.cond.label.tolist())
            trace.add([routing.detach() for routing in losses.routings])
            if losses.noise is not None and self.by_noise:
                bins.add(losses.per_sample, losses.noise)
        values = np.array(total) * self.scale
        classes = by_class(values, labels, source.class_names)
        rows = loss_bins(bins) if self.by_noise else []
        return HeldOut(float(values.mean()), rows, trace, classes, classes)

    @property
    def by_noise(self) -> bool:
        """Whether the held-out loss depends on a noise level."""
        return False

    def scores(self, num: int) -> dict[str, Any]:
        """Metrics of ``num`` samples by name: numbers, or {value, floor}; texts are notes."""
        return {}

    def measures(self) -> dict[str, float]:
        """Further numbers from held-out data."""
        return {}

    def details(self) -> dict[str, float]:
        """Numbers for the page of a report, beyond those that claims compare."""
        return {}

    def draw(self, num: int, **options: Any) -> Samples:
        """See :func:`coterie.runs.sample.sampling.generate`."""
        return generate(self.run, num, **options)

    def show(self, samples: Samples) -> np.ndarray | Sequence[str] | None:
        """The samples in the form a report page takes."""
        return None

    def labels(self, samples: Samples) -> list[int] | None:
        return samples.labels.tolist() if conditional(self.run) else None

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        """Write the samples and add each one's file to its entry; returns the path to open."""
        raise NotImplementedError


JUDGES: dict[str, type[Judge]] = {}
"""Modality of a source -> its judge."""


def judges(*modalities: str) -> Callable[[type[Judge]], type[Judge]]:
    """Class decorator: this is the judge of ``modalities``."""

    def register(cls: type[Judge]) -> type[Judge]:
        for modality in modalities:
            if JUDGES.setdefault(modality, cls) is not cls:
                raise ValueError(f"modality {modality!r} has two judges")
        return cls

    return register


def judge_of(run: LoadedRun) -> Judge:
    """The judge for a run, by its objective or by the data's modality.

    ConfigError if there is none for this modality.
    """
    modality = getattr(run.config.objective, "answers", run.source.modality)
    if modality not in JUDGES:
        raise ConfigError(unknown("modality", modality, JUDGES))
    return JUDGES[modality](run)


def batches(source: Source, size: int, limit: int) -> list[Batch]:
    """``limit`` samples of a source, always the same ones, drawn evenly: files are often sorted."""
    count = min(limit, len(source))
    rows = order(0, 0, count, len(source))
    return [source.get(rows[first : first + size]) for first in range(0, count, size)]


def by_class(values: np.ndarray, labels: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Mean of ``values`` [S] for each label that occurs; {} without labels."""
    return {
        label_name(label, names): float(values[np.array(labels) == label].mean())
        for label in sorted(set(labels))
    }


def loss_bins(bins: NoiseBins) -> list[dict[str, Any]]:
    """Rows {bin, lo, hi, loss, count} of the bins that have data."""
    return [
        {"bin": index, "lo": row.low, "hi": row.high, "loss": row.mean, "count": row.num_samples}
        for index, row in enumerate(bins.result())
        if row.mean is not None
    ]


def make_trace(run: LoadedRun) -> Trace:
    backbone = run.config.model.backbone
    return Trace(
        noise_bins=LEVELS,
        noise_to_unit=getattr(getattr(run.model, "process", None), "unit_time", None),
        grid=getattr(backbone, "grid", None),
    )
