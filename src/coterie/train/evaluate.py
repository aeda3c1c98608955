"""What a trained run is worth, in numbers: held-out loss by noise level, distances of samples to
real data with their floors, and what its routers do. The report and the claims read these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.prediction import Prediction
from coterie.core.rng import generator
from coterie.data import Subset, order
from coterie.inspect import Trace, label_name
from coterie.metrics import NoiseBins, evaluate_images
from coterie.train import probes
from coterie.train.active import active_parameters, choices_per_row, expert_sites
from coterie.train.answers import answer_measures, marks_answers
from coterie.train.features import feature_network, reference_rows
from coterie.train.routing_measures import routing_measures
from coterie.train.run import LoadedRun, build_source
from coterie.train.rundir import RunDir, read_metrics
from coterie.train.sampling import conditional, generate

LEVELS = 10  # noise levels at which held-out data are looked at


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss (mean over noise levels), per level, and the routings seen on the way; of text
    with classes also the loss of each class that was seen."""

    loss: float
    bins: list[dict[str, Any]]
    trace: Trace
    by_class: dict[str, float] = field(default_factory=dict)


def batches(source: Source, size: int, limit: int) -> list[Batch]:
    """``limit`` samples of a source, always the same ones, drawn evenly: files are often sorted."""
    count = min(limit, len(source))
    rows = order(0, 0, count, len(source))
    return [source.get(rows[first : first + size]) for first in range(0, count, size)]


@torch.no_grad()
def held_out(run: LoadedRun, limit: int = 512, size: int = 128) -> HeldOut:
    """Every held-out sample at every one of ``LEVELS`` noise levels, with fixed noise.

    The noise depends on the batch (always the same ones) and the level only: two runs on the same
    data are compared on the same noisy inputs. The loss is conditional; where the model has a null
    condition, one batch is also traced without its labels.
    """
    source = build_source(run.config, "held_out")
    trace = make_trace(run)
    if run.is_text:
        return _held_out_text(run, source, trace, limit, size)
    process = run.model.process
    bins = NoiseBins(LEVELS)
    objective = run.config.objective.build(run.model)
    for number, batch in enumerate(batches(source, size, limit)):
        for level in range(LEVELS):
            unit = torch.full((len(batch.ids),), (level + 0.5) / LEVELS)
            t = process.time_of_unit(unit)
            rng = generator(0, "held_out", int(batch.ids[0]), level)
            eps = torch.randn(batch.x.shape, generator=rng)
            x_t = process.diffuse(batch.x, eps, t)
            prediction = run.model(x_t, t, batch.cond, sample_ids=batch.ids)
            bins.add(objective.error(prediction, batch.x, eps, t), unit)
            trace.add(prediction.routings)
            if number == 0 and conditional(run) and prediction.routings:
                null = batch.cond.as_null(len(batch.ids))
                trace.add(run.model(x_t, t, null, sample_ids=batch.ids).routings)
    rows = loss_bins(bins)
    return HeldOut(float(np.mean([row["loss"] for row in rows])), rows, trace)


def loss_bins(bins: NoiseBins) -> list[dict[str, Any]]:
    """Rows {bin, lo, hi, loss, count} of the bins that have data."""
    return [
        {"bin": index, "lo": row.low, "hi": row.high, "loss": row.mean, "count": row.num_samples}
        for index, row in enumerate(bins.result())
        if row.mean is not None
    ]


def _held_out_text(run: LoadedRun, source: Source, trace: Trace, limit: int, size: int) -> HeldOut:
    """Bits per token of the objective itself; masked models are averaged over mask shares."""
    objective = run.config.objective.build(run.model)
    masked = run.config.model.masking == "masked"
    bins = NoiseBins(LEVELS)
    total: list[float] = []
    labels: list[int] = []
    for batch in batches(source, size, limit):
        rng = generator(0, "held_out", int(batch.ids[0]))
        losses = objective(run.model, batch, rng, 1.0)
        total.extend(losses.per_sample.tolist())
        if batch.cond.label is not None:
            labels.extend(batch.cond.label.tolist())
        trace.add([routing.detach() for routing in losses.routings])
        if masked:
            bins.add(losses.per_sample, losses.noise)
    rows = loss_bins(bins) if masked else []
    bits = np.array(total) / np.log(2)
    by_class = {
        label_name(label, source.class_names): float(bits[np.array(labels) == label].mean())
        for label in sorted(set(labels))
    }
    return HeldOut(float(bits.mean()), rows, trace, by_class)


def make_trace(run: LoadedRun) -> Trace:
    backbone = run.config.model.backbone
    return Trace(
        noise_bins=LEVELS,
        noise_to_unit=getattr(getattr(run.model, "process", None), "unit_time", None),
        grid=getattr(backbone, "grid", None),
    )


def score_images(run: LoadedRun, x: Tensor, limit: int = 1000) -> dict[str, Any]:
    """Distances of generated images ``x`` to training images, each with the floor that held-out
    real images reach; features of the network that suits the source."""
    reference = Subset(run.source, reference_rows(len(run.source)))
    real, fresh = (
        torch.cat([batch.x for batch in batches(source, 250, limit)])
        for source in (reference, build_source(run.config, "held_out"))
    )
    return evaluate_images(feature_network(run.config.data), x, real, fresh)


def measure(run: LoadedRun, num_samples: int = 500) -> dict[str, float]:
    """The numbers that claims compare, all plain floats; docs/results.md says what each means."""
    found = held_out(run)
    out = {"held_out_loss": found.loss, **_text_measures(run, found)}
    out |= routing_measures(found.trace, run.source.class_names)
    out["active_parameters"] = float(measured_active(run, found.trace))
    out |= probes.measure(run) | _speed(run)
    if not run.is_text:
        scored = score_images(run, generate(run, num_samples).x)
        for name in ("frechet", "kid", "precision", "recall"):
            out[name] = float(scored[name]["value"])
            out[f"{name}_floor"] = float(scored[name]["floor"])
    return out


def _text_measures(run: LoadedRun, found: HeldOut) -> dict[str, float]:
    """Loss by class, and how well answers are known where the source marks them."""
    return {f"held_out_loss/{name}": loss for name, loss in found.by_class.items()} | answers(run)


def answers(run: LoadedRun, limit: int = 512, size: int = 128) -> dict[str, float]:
    """See :func:`answer_measures`; {} where nothing marks answers."""
    if not run.is_text or not marks_answers(run, run.source):
        return {}
    source = build_source(run.config, "held_out")
    return answer_measures(run, source, batches(source, size, limit))


def measured_active(run: LoadedRun, trace: Trace) -> int:
    """Parameters that one row uses, from the choices counted in ``trace``."""
    return active_parameters(run.model, expert_sites(run), choices_per_row(trace))


def _speed(run: LoadedRun) -> dict[str, float]:
    """Median over the log of the run's training; {} where none was written."""
    path = RunDir(run.path).metrics_path
    if not path.is_file():
        return {}
    machines = [record["machine"] for record in read_metrics(path) if "machine" in record]
    speeds = [item["tokens_per_second"] for item in machines if "tokens_per_second" in item]
    return {"train_tokens_per_second": float(np.median(speeds))} if speeds else {}


class StepRecorder:
    """A sampling callback that feeds each step's routings to a trace: conditional and
    unconditional halves are told apart by the labels the routings carry."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __call__(self, step: int, t: float, x: Tensor, prediction: Prediction) -> None:
        if prediction.routings:
            self.trace.add_step(step, prediction.routings)
