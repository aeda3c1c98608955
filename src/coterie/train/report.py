"""The report of a run: who does what, over layers, noise levels, classes and positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.core.cost import Parameters, count_parameters
from coterie.core.machine import commit, hardware_line
from coterie.inspect import ReportData, write_report
from coterie.train.evaluate import (
    HeldOut,
    StepRecorder,
    answers,
    held_out,
    make_trace,
    measured_active,
    score_images,
)
from coterie.train.probes import expert_cosines
from coterie.train.progress import stages
from coterie.train.run import LoadedRun, load_run
from coterie.train.rundir import RunDir, read_metrics
from coterie.train.sampling import conditional, generate, to_pixels

SHOWN = 64  # samples on the page; the routing of images is followed step by step
SCORED = 500  # samples behind the distances


def report_run(
    path: str | Path, out: str | Path | None = None, progress: bool = True, citation: str = ""
) -> Path:
    """Write ``index.html``, pictures and ``report.json`` to ``out`` (default: the run's
    ``report/``) and return the page."""
    run = load_run(path)
    folder = Path(out) if out is not None else run.path / "report"
    with stages(4, "report", progress) as bar:
        found = held_out(run)
        bar("held-out data at every noise level")
        trace = found.trace
        followed = make_trace(run)
        shown = generate(run, SHOWN, callback=_recorder(run, followed))
        trace.steps.update(followed.steps)
        bar("samples, step by step")
        metrics = _metrics(run, found)
        bar("distances to real data")
        data = ReportData(
            title=f"{run.config.recipe or run.path.name}: who does what",
            recipe=run.config.recipe,
            trace=trace,
            loss_bins=found.bins,
            curve=read_metrics(RunDir(path).metrics_path),
            samples=_texts(run, shown) if run.is_text else to_pixels(shown.x),
            labels=None if run.is_text or not conditional(run) else shown.labels.tolist(),
            class_names=run.source.class_names,
            similarity=expert_cosines(run),
            metrics=metrics,
            parameters=_parameters(run, found),
            config=run.config.model_dump(mode="json"),
            citation=citation,
            hardware=hardware_line(),
            commit=commit(),
            step=run.step,
        )
        page = write_report(folder, data)
        bar("page written")
    return page


def _parameters(run: LoadedRun, found: HeldOut) -> Parameters:
    return replace(count_parameters(run.model), active=measured_active(run, found.trace))


def _recorder(run: LoadedRun, trace: Any) -> StepRecorder | None:
    return None if run.is_text else StepRecorder(trace)


def _texts(run: LoadedRun, shown: Any) -> list[str]:
    tokenizer = run.source.tokenizer  # type: ignore[attr-defined]
    return [tokenizer.decode(row) for row in shown.x]


def _metrics(run: LoadedRun, found: HeldOut) -> dict[str, Any]:
    unit = "bits per token" if run.is_text else f"mean squared error, {run.config.model.view}"
    title = f"held-out loss ({unit})"
    out: dict[str, Any] = {title: found.loss}
    out |= {f"{title}, {name}": loss for name, loss in found.by_class.items()}
    names = {
        "answer_loss": "loss of answers (bits per token)",
        "answer_accuracy": "answers that are right, token by token",
    }
    out |= {names[key]: value for key, value in answers(run).items()}
    if not run.is_text and len(run.source.shape) == 3:
        out |= score_images(run, generate(run, SCORED).x)
    return out
