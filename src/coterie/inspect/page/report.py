"""The report: one self-contained page, its pictures and its numbers.

    write_report(run / "report", ReportData(title="DiT-MoE on digits", trace=trace))

writes ``index.html`` (pictures inside, nothing fetched), ``report.json`` and one PNG per picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coterie.core.outputs import Outputs
from coterie.inspect.page.anomaly_verdicts import verdicts
from coterie.inspect.page.composition_section import composed_numbers
from coterie.inspect.page.html import page
from coterie.inspect.page.report_data import ReportData, check
from coterie.inspect.page.report_json import (
    SCHEMA_VERSION,
    curve_numbers,
    routing_numbers,
    similarity_numbers,
    to_json,
)
from coterie.inspect.page.sections import build_sections, footer, header
from coterie.inspect.plots.anomalies import anomaly_plots
from coterie.inspect.plots.balance import (
    plot_affinity,
    plot_choices,
    plot_consistency,
    plot_load,
    plot_noise_curves,
    plot_pairs,
    plot_prototypes,
)
from coterie.inspect.plots.clouds import plot_clouds
from coterie.inspect.plots.experts_per_row import (
    plot_amounts,
    plot_amounts_by_class,
    plot_amounts_by_position,
)
from coterie.inspect.plots.gates import plot_gate_maps
from coterie.inspect.plots.particles import plot_particles
from coterie.inspect.plots.positions import plot_positions
from coterie.inspect.plots.relations import (
    plot_adjacent,
    plot_imbalance,
    plot_owners,
    plot_rounds,
    plot_similarity,
)
from coterie.inspect.plots.routing import (
    plot_classes,
    plot_information,
    plot_noise,
    plot_steps,
)
from coterie.inspect.plots.run import plot_curves, plot_loss_bins, plot_points, plot_samples
from coterie.inspect.plots.style import Plot, render
from coterie.inspect.statistics.anomalies import Anomalies, analyse_anomalies, anomaly_numbers
from coterie.inspect.statistics.experts_per_row import analyse_amounts
from coterie.inspect.statistics.pairs import analyse_pairs
from coterie.inspect.statistics.pools import analyse_pools
from coterie.inspect.statistics.routers import RouterStats, analyse
from coterie.inspect.statistics.trace import Trace

PAGE, INDEX = "index.html", "report.json"
_NAMES = re.compile(r"index\.html|report\.json")


def write_report(out_dir: str | Path, data: ReportData) -> Path:
    """Write the report and return the path of its page.

    Files of an earlier report are replaced; others are left alone, and one that is in the way is
    a ConfigError. Raises DataError for samples or loss bins of an unknown form, before anything is
    written.
    """
    check(data)
    outputs = report_outputs(out_dir)
    trace = data.trace or Trace()
    items = analyse(trace)
    names = {"class": data.class_names, "task": data.task_names}
    anomalies = analyse_anomalies(trace, items, data.answers, names, data.losses)
    pictures = {plot.name: render(plot) for plot in _plots(data, trace, items, anomalies)}
    numbers = _numbers(data, trace, items, anomalies)
    numbers["files"] = [PAGE, *sorted(f"{name}.png" for name in pictures)]
    html = page(
        data.title,
        header(data, items),
        build_sections(data, trace, items, pictures, anomalies),
        footer(data),
    )
    with outputs.writing() as work:
        for name, picture in pictures.items():
            (work / f"{name}.png").write_bytes(picture.light)
        (work / INDEX).write_text(to_json(numbers), encoding="utf-8")
        (work / PAGE).write_text(html, encoding="utf-8")
    return outputs.folder / PAGE


def report_outputs(folder: str | Path) -> Outputs:
    """``folder``, checked before anything is measured.

    ConfigError if a report cannot be written there, or would replace another page.
    """
    return Outputs.at(folder, INDEX, _listed).check(_NAMES)


def _listed(data: Any) -> list[str] | None:
    files = data.get("files") if isinstance(data, dict) else None
    return [str(name) for name in files] if isinstance(files, list) else None


def _plots(
    data: ReportData, trace: Trace, items: Sequence[RouterStats], anomalies: Anomalies
) -> list[Plot]:
    routers = trace.routers
    names = [item.name for item in items]
    by_place: dict[Any, str] = {item.place: item.name for item in items}
    found = [
        plot_information(items),
        plot_noise(routers, names) if routers else None,
        plot_classes(routers, names, data.class_names),
        plot_positions(routers, names, trace.grid),
        plot_gate_maps(data.gate_maps),
        plot_load(items, routers),
        plot_noise_curves(routers, names),
        plot_choices(routers, names),
        plot_pairs(routers, names),
        plot_prototypes(routers, names),
        *anomaly_plots(anomalies),
        *_relation_plots(data, trace, by_place),
        plot_particles(data.particles if data.composed is not None else ()),
        plot_steps(trace, by_place),
        plot_consistency(trace, by_place),
        plot_affinity(routers),
        plot_loss_bins(data.loss_bins, data.loss_unit),
        _sample_plot(data),
        plot_curves(data.curve),
    ]
    return [plot for plot in found if plot is not None]


def _relation_plots(data: ReportData, trace: Trace, by_place: dict[Any, str]) -> list[Plot | None]:
    amounts, pairs, pools = analyse_amounts(trace), analyse_pairs(trace), analyse_pools(trace)
    return [
        plot_amounts(amounts),
        plot_amounts_by_class(amounts, data.class_names),
        plot_amounts_by_position(amounts, trace.grid),
        plot_rounds(pairs),
        plot_adjacent(pairs),
        plot_owners(pools),
        plot_imbalance(pools),
        plot_similarity(data.similarity, by_place),
    ]


def _sample_plot(data: ReportData) -> Plot | None:
    if not isinstance(data.samples, np.ndarray) or len(data.samples) == 0:
        return None
    if data.samples.ndim == 4:
        return plot_samples(data.samples, data.labels, data.class_names)
    if data.samples.ndim == 3:
        return plot_clouds(data.samples, data.labels, data.class_names)
    return plot_points(data.samples, data.labels)


def _numbers(
    data: ReportData, trace: Trace, items: Sequence[RouterStats], anomalies: Anomalies
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "title": data.title,
        "recipe": data.recipe,
        "step": data.step,
        "commit": data.commit,
        "hardware": data.hardware,
        "citation": data.citation,
        "config": data.config,
        "parameters": None if data.parameters is None else vars(data.parameters),
        "metrics": data.metrics,
        "notes": list(data.notes),
        "loss_by_noise": list(data.loss_bins),
        "training": curve_numbers(data.curve),
        "num_samples": 0 if data.samples is None else len(data.samples),
        "class_names": list(data.class_names),
        "routing": routing_numbers(trace, items, data.class_names),
        "anomalies": anomaly_numbers(anomalies)
        | {"verdicts": [vars(verdict) for verdict in verdicts(anomalies)]},
        "composition": composed_numbers(data),
        "expert_similarity": similarity_numbers(data.similarity),
    }
