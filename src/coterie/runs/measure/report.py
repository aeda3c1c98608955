"""The report of a run: routing by layer, noise level, class and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.core.cost import Parameters, count_parameters
from coterie.core.machine import commit, hardware_line
from coterie.inspect import ReportData, noise_name, report_outputs, write_report
from coterie.runs.judges import HeldOut, Judge, judge_of
from coterie.runs.judges.base import make_trace
from coterie.runs.judges.text import ANSWERS
from coterie.runs.measure.evaluation import StepRecorder, held_out, measured_active
from coterie.runs.measure.expert_answers import watched_answers
from coterie.runs.measure.gate_maps import gate_maps
from coterie.runs.measure.routing_probes import expert_cosines
from coterie.runs.origins.composition import composed_of
from coterie.runs.sample.threads import draw_threads
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.train.progress import stages
from coterie.train.run_directory import RunDir, read_metrics

SHOWN = 64  # samples on the page; the routing of images is followed step by step
SCORED = 500  # samples behind the distances


def report_run(
    path: str | Path, out: str | Path | None = None, progress: bool = True, citation: str = ""
) -> Path:
    """Write ``index.html``, pictures and ``report.json`` to ``out`` (default: the run's
    ``report/``) and return the page."""
    run = load_run(path)
    folder = Path(out) if out is not None else run.path / "report"
    report_outputs(folder)
    judge = judge_of(run)
    draws = SHOWN + SCORED
    with stages(4, "report", progress) as bar, draw_threads(judge, draws):
        with watched_answers(run.model) as answers:
            found = held_out(run)
        bar("held-out data at every noise level")
        trace = found.trace
        followed = make_trace(run)
        recorder = StepRecorder(followed) if judge.steps else None
        shown = judge.draw(SHOWN, callback=recorder) if judge.draws else None
        trace.steps.update(followed.steps)
        bar("samples, step by step")
        metrics = _metrics(judge, found)
        bar("distances to real data")
        data = ReportData(
            title=f"{run.config.recipe or run.path.name}: who does what",
            recipe=run.config.recipe,
            trace=trace,
            loss_bins=found.bins,
            curve=read_metrics(RunDir(path).metrics_path),
            samples=None if shown is None else judge.show(shown),
            labels=None if shown is None else judge.labels(shown),
            class_names=run.source.class_names,
            task_names=getattr(run.source, "task_names", ()),
            similarity=expert_cosines(run),
            gate_maps=gate_maps(run),
            answers=answers.answers(),
            losses={"class": found.class_losses, "noise": _by_noise(found.bins)},
            metrics=metrics,
            parameters=_parameters(run, found),
            config=run.config.model_dump(mode="json"),
            composed=composed_of(run),
            particles=[one.as_json() for one in shown.particles] if shown else (),
            citation=citation,
            hardware=hardware_line(),
            commit=commit(),
            step=run.step,
        )
        page = write_report(folder, data)
        bar("page written")
    return page


def _by_noise(bins: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss of each noise bin by the name that the meters give it."""
    return {noise_name(row["lo"], row["hi"]): row["loss"] for row in bins}


def _parameters(run: LoadedRun, found: HeldOut) -> Parameters:
    return replace(count_parameters(run.model), active=measured_active(run, found.trace))


def _metrics(judge: Judge, found: HeldOut) -> dict[str, Any]:
    title = f"held-out loss ({judge.unit()})"
    out: dict[str, Any] = {title: found.loss}
    out |= {f"{title}, {name}": loss for name, loss in found.by_class.items()}
    out |= {ANSWERS.get(name, name): value for name, value in judge.measures().items()}
    return out | judge.details() | judge.scores(SCORED)
