"""The sections of the page, and the tables between the plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.inspect.page import html
from coterie.inspect.page.anomaly_section import anomaly_section
from coterie.inspect.page.anomaly_verdicts import summary as meters
from coterie.inspect.page.anomaly_verdicts import verdicts
from coterie.inspect.page.composition_section import (
    composed_findings,
    composed_section,
    composed_sentences,
)
from coterie.inspect.page.findings import Finding, experts, findings, sentences, worst_first
from coterie.inspect.page.html import Cell, Section
from coterie.inspect.page.metric_names import ARROWS, explained, metric_name
from coterie.inspect.page.report_json import plain
from coterie.inspect.phrases import expert_name, fixed, listing
from coterie.inspect.plots.style import Picture
from coterie.inspect.statistics.anomalies import Anomalies
from coterie.inspect.statistics.experts_per_row import Amounts, analyse_amounts
from coterie.inspect.statistics.formulas import UNEVEN_ENTROPY
from coterie.inspect.statistics.pairs import PairStats, analyse_pairs
from coterie.inspect.statistics.routers import FACETS, RouterStats
from coterie.inspect.statistics.trace import Trace

if TYPE_CHECKING:
    from coterie.inspect.page.report_data import ReportData

AMOUNTS = (
    *("experts_per_row", "choices"),
    *("experts_per_row_by_class", "experts_per_row_by_position"),
)
RELATIONS = ("owners", "pool_imbalance", "expert_similarity")
SPREAD = {"noise": "noise levels", "class": "classes", "position": "positions", "task": "tasks"}
MAX_TEXTS = 12
MAX_TEXT = 1200
Pictures = Mapping[str, Picture]


def header(data: ReportData, items: Sequence[RouterStats]) -> str:
    from html import escape

    over = listing(["layers", *(SPREAD[facet] for facet in FACETS if _told(items, facet))])
    lead = f"Who does what in this model: experts over {over}."
    if data.composed is not None and not items:
        lead = "Trained models composed: what they aim at, and who had weight on the way."
    facts = [("Recipe", data.recipe), ("Training step", _integer(data.step))]
    if data.parameters is not None:
        facts.append(("Parameters", _millions(data.parameters.total)))
        facts.append(("Active for one token", _millions(data.parameters.active)))
    if items:
        facts.append(("Routed layers", str(len(items))))
        sizes = sorted({item.num_experts for item in items})
        facts.append(("Experts per layer", " or ".join(map(str, sizes[:4]))))
    facts += [("Commit", data.commit[:12]), ("Hardware", data.hardware)]
    return (
        '<p class="eyebrow">Routing report</p>'
        f'<h1>{escape(data.title)}</h1><p class="lead">{lead}</p>'
        + html.facts((key, value) for key, value in facts if value)
    )


def footer(data: ReportData) -> str:
    return html.paragraph(
        "All numbers are in report.json; every picture lies beside this page as a PNG file."
    )


def build_sections(
    data: ReportData,
    trace: Trace,
    items: Sequence[RouterStats],
    pictures: Pictures,
    anomalies: Anomalies,
) -> list[Section]:
    """Sections without content are left out, with the reason where a reader may look for them."""
    out = [Section("summary", "Summary", _summary(data, trace, items, anomalies))]
    if items:
        out.append(
            Section("specialisation", "Who does what", _specialisation(data, items, pictures))
        )
        out.append(Section("balance", "How the work is shared", _balance(items, pictures)))
        if wrong := anomaly_section(anomalies, pictures):
            out.append(Section("anomalies", "What may be wrong", wrong))
        if several := _show(pictures, *AMOUNTS):
            table = html.card(_amount_table(analyse_amounts(trace)))
            out.append(Section("amounts", "How many experts a row uses", table + several))
        if relations := _relations(trace, pictures):
            out.append(Section("relations", "Who follows whom", relations))
    if composed := composed_section(data, pictures):
        out.append(Section("composition", "What is composed", composed))
    along = _show(pictures, "expert_by_step", "step_consistency", "task_affinity")
    if along:
        out.append(Section("sampling", "Along the noise", along))
    if quality := _quality(data, pictures):
        out.append(Section("quality", "Quality", quality))
    if training := _show(pictures, "training"):
        out.append(Section("training-log", "Training", training))
    if run := _run(data):
        out.append(Section("run", "This run", run))
    return out


def _show(pictures: Pictures, *names: str) -> str:
    return "".join(html.picture(pictures[name]) for name in names if name in pictures)


def _summary(
    data: ReportData, trace: Trace, items: Sequence[RouterStats], anomalies: Anomalies
) -> str:
    lines = [] if data.composed and not items else sentences(trace, items, data.class_names)
    if data.composed is not None:
        lines = [*composed_sentences(data), *lines]
    for name, entry in _metrics(data.metrics):
        if "floor" in entry and "/" not in name.replace(" / ", ""):  # classes are in the table
            score, floor = _short(entry["value"]), _short(entry["floor"])
            text = f"By {explained(name)} the samples score {score}, {_floor_of(entry)} {floor}"
            lines.append(f"{text} in their place.")
    notes = [Finding("note", text) for text in data.notes]
    particles = composed_findings(data)
    found = worst_first([*findings(items), *meters(verdicts(anomalies)), *particles])
    return html.finding_list([*notes, *found]) + html.card(html.says(lines))


def _told(items: Sequence[RouterStats], facet: str) -> bool:
    """Whether any router's choices can be set against this property; so for a dense model."""
    if not items:
        return facet != "task"
    return any(facet in item.information for item in items)


def _specialisation(data: ReportData, items: Sequence[RouterStats], pictures: Pictures) -> str:
    reasons = {}
    for facet in data.facets:
        missing = {item.omitted[facet] for item in items if facet in item.omitted}
        if missing and not any(facet in item.information for item in items):
            reasons[f"Experts by {facet}"] = ", ".join(sorted(missing))
    bits = ""
    if "information" in pictures:
        table = html.details("The numbers", _information_table(items))
        bits = html.picture(pictures["information"], table)
    along = ("expert_by_noise", "expert_by_class", "expert_by_position", "gate_maps")
    maps = _show(pictures, *along)
    return bits + maps + html.omitted(reasons)


def _information_table(items: Sequence[RouterStats]) -> str:
    head = ["Layer"]
    facets = [facet for facet in FACETS if _told(items, facet)]
    for facet in facets:
        head += [f"{facet.capitalize()} (bits)", "chance", "share"]
    rows: list[list[str | Cell]] = []
    for item in items:
        row: list[str | Cell] = [item.name]
        for facet in facets:
            info = item.information.get(facet)
            if info is None:
                row += [Cell("–", "faint")] * 3
                continue
            style = "" if info.measurable else "faint"
            row += [Cell(fixed(info.corrected), style), Cell(fixed(info.floor), "faint")]
            row.append(Cell(f"{info.normalised:.0%}", style))
        rows.append(row)
    caption = (
        "Mutual information with the Miller-Madow correction; chance: what unrelated variables "
        "hardly exceed; share: of the most it could be (uncorrected). Grey: not above chance."
    )
    return html.table(caption, head, rows)


def _balance(items: Sequence[RouterStats], pictures: Pictures) -> str:
    reasons = {}
    if "coactivation" not in pictures:
        reasons["Experts that work together"] = "no row uses two of three or more experts"
    return (
        html.card(_load_table(items))
        + _show(pictures, "load", "balance_over_noise", "coactivation", "prototypes")
        + html.omitted(reasons)
    )


def _load_table(items: Sequence[RouterStats]) -> str:
    head = ["Layer", "Experts", "Used per row", "Rows", "Scored", "Max / mean", "CV"]
    head += ["Load entropy", "Row entropy", "Dead"]
    noisy = _told(items, "noise") or any(item.always_on for item in items)
    rows: list[list[str | Cell]] = []
    for item in items:
        uneven = item.entropy < UNEVEN_ENTROPY and item.unit == "token"
        bad = item.enough and (uneven or (item.collapsed and item.missed))
        rows.append(
            [
                item.name,
                str(item.num_experts),
                f"{item.choices_per_row:.3g}",
                f"{item.rows:,.0f}",
                f"{item.rows_scored:.0%}",
                f"{item.max_over_mean:.2f}",
                f"{item.cv:.2f}",
                Cell(fixed(item.entropy), "bad" if bad else ""),
                _finite(item.confidence),
                _dead_cell(item),
            ]
        )
        if noisy:
            always = experts(item.always_on, 4, item.expert_names) if item.always_on else "–"
            rows[-1].append(Cell(always, "faint"))
    caption = (
        f"Load of the routers over their {_half(items)}rows (rows: "
        f"{' or '.join(sorted({item.unit + 's' for item in items}))}). CV: coefficient of "
        "variation of the load. Entropies are divided by log E: load entropy 1 is an even load, "
        "row entropy 0 a certain router."
    )
    if noisy:
        head.append("Always on")
        caption += " Always on: chosen by most rows at every noise level."
    return html.table(caption, head, rows)


def _half(items: Sequence[RouterStats]) -> str:
    """Which rows are described; nothing to say where a model knows no conditions."""
    if all(item.half == "unconditional" for item in items):
        return "unconditional "
    return "conditional " if _told(items, "class") else ""


def _dead_cell(item: RouterStats) -> Cell:
    if not item.enough:
        return Cell("few rows", "faint")
    if not item.dead:
        return Cell("0", "")
    named = [expert_name(index, item.expert_names) for index in item.dead[:6]]
    ids = ", ".join(named) + (", ..." if len(item.dead) > 6 else "")
    return Cell(f"{len(item.dead)} ({ids})", "bad" if item.missed else "")


def _amount_table(amounts: Sequence[Amounts]) -> str:
    rows: list[list[str | Cell]] = [
        [item.name, _finite(item.mean), str(item.p95), str(item.most)] for item in amounts
    ]
    caption = (
        "Experts that a row uses. 95 of 100: so many rows use at most this number; most: what "
        "every row would cost if all were padded to the largest."
    )
    return html.table(caption, ["Layer", "Mean", "95 of 100", "Most"], rows)


def _relations(trace: Trace, pictures: Pictures) -> str:
    out = ""
    pairs = analyse_pairs(trace)
    for name, kind in (("rounds", "round"), ("adjacent_layers", "layer")):
        if name in pictures:
            same = [pair for pair in pairs if pair.kind == kind]
            out += html.picture(pictures[name], html.details("The numbers", _pair_table(same)))
    omitted = {pair.name: pair.reason for pair in pairs if pair.reason}
    return out + _show(pictures, *RELATIONS) + html.omitted(omitted)


def _pair_table(pairs: Sequence[PairStats]) -> str:
    rows: list[list[str | Cell]] = []
    for pair in pairs:
        info = pair.information
        style = "" if info is not None and info.measurable else "faint"
        told = ["–"] * 2 if info is None else [fixed(info.corrected), fixed(info.floor)]
        shared = [_finite(pair.overlap), _finite(pair.chance)]
        rows.append(
            [pair.name, *(Cell(text, style) for text in told), *shared, f"{pair.rows:,.0f}"]
        )
    caption = (
        "Information between the first choices (largest gates), Miller-Madow corrected; chance: "
        "what unrelated choices hardly exceed. Overlap: share of common experts, where both "
        "choose among the same ones, and what independent choices would share."
    )
    head = ["Pair", "Information (bits)", "chance", "Overlap", "by chance", "Rows"]
    return html.table(caption, head, rows)


def _quality(data: ReportData, pictures: Pictures) -> str:
    out = ""
    entries = _metrics(data.metrics)
    if entries:
        out += html.card(_metric_table(data.metrics, entries))
    if "loss_by_noise" in pictures:
        rows = [
            [f"{row['lo']:.2g} to {row['hi']:.2g}", _short(row["loss"]), _short(row.get("count"))]
            for row in data.loss_bins
        ]
        table = html.table("Mean loss per noise bin.", ["Noise level t", "Loss", "Samples"], rows)
        out += html.picture(pictures["loss_by_noise"], html.details("The numbers", table))
    out += _show(pictures, "samples")
    if data.samples is not None and not isinstance(data.samples, np.ndarray):
        out += _texts(data.samples)
    return out


def _texts(texts: Sequence[str]) -> str:
    shown = "".join(
        html.preformatted(text[:MAX_TEXT] + (" [...]" if len(text) > MAX_TEXT else ""), wrap=True)
        for text in texts[:MAX_TEXTS]
    )
    note = "Drawn from the model, not selected."
    if len(texts) > MAX_TEXTS:
        note += f" The first {MAX_TEXTS} of {len(texts)}."
    return html.card(f"<h3>Samples</h3>{html.paragraph(note, 'lead')}{shown}") if shown else ""


def _metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Numbers as (name, {value, floor, ...}); nested groups get ``group / name``."""
    out: list[tuple[str, dict[str, Any]]] = []
    for key, entry in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping) and "value" in entry:
            out.append((name, dict(entry)))
        elif isinstance(entry, Mapping):
            out += _metrics(entry, f"{name} / ")
        elif _is_number(entry) and key != "n" and not key.endswith("_floor"):
            floor = metrics.get(f"{key}_floor")
            out.append((name, {"value": entry} | ({} if floor is None else {"floor": floor})))
    return out


def _metric_table(metrics: Mapping[str, Any], entries: list[tuple[str, dict[str, Any]]]) -> str:
    floors = any("floor" in entry for _, entry in entries)
    rows: list[list[str | Cell]] = []
    for name, entry in entries:
        error = f" ± {_short(entry['stderr'])}" if entry.get("stderr") is not None else ""
        called = metric_name(name)
        rows.append([called.text, _short(entry["value"]) + error])
        if floors:
            rows[-1].append(_short(entry["floor"]) if "floor" in entry else "–")
        rows[-1].append(ARROWS[called.better])
    notes = [f"{key}: {value}" for key, value in metrics.items() if isinstance(value, str)]
    if isinstance(metrics.get("n"), int):
        notes.append(f"{metrics['n']:,} samples")
    caption = "; ".join(notes)
    head = ["Metric", "Value"]
    if floors:
        head.append("Floor")
        whose = next(_floor_of(entry) for _, entry in entries if "floor" in entry)
        caption = f"Floor: what {whose} score in the place of the samples. {caption}"
    return html.table(caption or "What was measured.", [*head, "Better"], rows)


def _floor_of(entry: Mapping[str, Any]) -> str:
    """What stands in the place of samples to score the floor."""
    return str(entry.get("floor_of", "real held-out data"))


def _run(data: ReportData) -> str:
    out = ""
    if data.citation:
        out += html.card(f"<h3>Citation</h3>{html.preformatted(data.citation)}")
    if data.config:
        text = json.dumps(plain(data.config), indent=2, sort_keys=True)
        out += html.card(html.details("Configuration", html.preformatted(text)))
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _finite(value: float) -> str:
    return fixed(value) if math.isfinite(value) else "–"


def _integer(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _millions(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
