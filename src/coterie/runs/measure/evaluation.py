"""The metrics of a trained run: held-out loss, quality of samples, and routing."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from coterie.core.prediction import Prediction
from coterie.inspect import Trace
from coterie.runs.judges import HeldOut, judge_of
from coterie.runs.measure import routing_probes
from coterie.runs.measure.active_parameters import (
    active_parameters,
    choices_per_row,
    expert_sites,
    member_shares,
    slot_parameters,
)
from coterie.runs.measure.adapters import adapter_measures
from coterie.runs.measure.routing import routing_measures
from coterie.runs.trained_run import LoadedRun
from coterie.train.run_directory import RunDir, read_metrics


def held_out(run: LoadedRun, limit: int = 512, size: int = 128) -> HeldOut:
    """Loss and routings on ``limit`` held-out samples, evaluated by the run's judge."""
    return judge_of(run).held_out(limit, size)


def measure(run: LoadedRun, num_samples: int = 500) -> dict[str, float]:
    """The metrics that claims and reports use, as plain floats; docs/explanation/results.md
    explains them."""
    judge, found = judge_of(run), held_out(run)
    out = {"held_out_loss": found.loss}
    out |= {f"held_out_loss/{name}": loss for name, loss in found.by_class.items()}
    out |= judge.measures()
    out |= routing_measures(found.trace, run.source.class_names)
    out["active_parameters"] = float(measured_active(run, found.trace))
    out["slot_parameters"] = float(slot_parameters(run.model))
    out |= routing_probes.measure(run) | adapter_measures(run) | _speed(run)
    return out | flat(judge.scores(num_samples))


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """``name`` and, where there is one, ``name_floor``; texts and sample counts left out."""
    out: dict[str, float] = {}
    for name, entry in scores.items():
        if isinstance(entry, dict):
            out[name], out[f"{name}_floor"] = float(entry["value"]), float(entry["floor"])
        elif isinstance(entry, float):
            out[name] = entry
    return out


def measured_active(run: LoadedRun, trace: Trace) -> int:
    """Parameters that one row uses, from the choices counted in ``trace``."""
    asked = member_shares(run.model, trace)
    return active_parameters(run.model, expert_sites(run), choices_per_row(trace), asked)


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
