"""The section of the page about collapse, degradation and underfitting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coterie.inspect.page import html
from coterie.inspect.page.anomaly_verdicts import (
    IDLE,
    ONE_SIDED,
    SCALE_NOTE,
    ZEROS,
    Verdict,
    verdicts,
)
from coterie.inspect.page.findings import experts
from coterie.inspect.page.html import Cell
from coterie.inspect.plots.style import Picture
from coterie.inspect.statistics.anomalies import Anomalies, Collapse, Degradation, Underfitting

LEAD = (
    "Three ways in which a mixture of experts goes wrong without a higher loss saying so: experts "
    "that answer at different scales (collapse), experts for several that work for one "
    "(degradation), and what is rare or private being left out (underfitting)."
)
MEASURES = {
    "Collapse": "strongest / weakest expert of a layer",
    "Degradation": "largest share of one column in an expert",
    "Underfitting": "gate weight, or loss, relative to the rest",
}
PICTURES = ("expert_scales", "gates_by_", "left_out")
MOST = 64
"""Rows of a table; the data file has all."""


def anomaly_section(found: Anomalies, pictures: Mapping[str, Picture]) -> str:
    """Empty only for a dense model."""
    said = verdicts(found)
    if not said:
        return ""
    tables = {
        "expert_scales": _scale_table(found.collapse),
        "gates_by_": _one_sided_table(found.degradation),
        "left_out": _left_out_table(found.underfitting),
    }
    out = html.paragraph(LEAD, "lead") + html.finding_list([verdict.finding for verdict in said])
    out += html.card(_meter_table(said))
    for prefix in PICTURES:
        numbers = html.details("The numbers", tables[prefix]) if tables[prefix] else ""
        shown = [pictures[name] for name in pictures if name.startswith(prefix)]
        out += "".join(html.picture(picture, numbers) for picture in shown)
    return out


def _meter_table(said: Sequence[Verdict]) -> str:
    rows: list[list[str | Cell]] = [
        [
            verdict.meter,
            Cell(_short(verdict.number), "bad" if verdict.level == "alarm" else ""),
            _short(verdict.ideal),
            Cell(MEASURES[verdict.meter], "words"),
        ]
        for verdict in said
    ]
    caption = "The worst reading over all layers."
    return html.table(caption, ["Meter", "Reading", "Ideal", "What is read"], rows)


def _scale_table(items: Sequence[Collapse]) -> str:
    rows: list[list[str | Cell]] = []
    for item in items:
        answers = item.answers
        for expert, scale in enumerate(answers.scale):
            rows.append(
                [
                    f"{item.name}, expert {expert}",
                    _short(float(answers.mean[expert])),
                    _short(float(answers.std[expert])),
                    _short(float(scale)),
                    Cell(
                        _percent(float(answers.zeros[expert])),
                        "bad" if answers.zeros[expert] > ZEROS else "",
                    ),
                    f"{answers.rows[expert]:,.0f}",
                ]
            )
    caption = (
        "Answers of each expert to held-out rows that chose it, before the gates. Zeros: of its "
        f"inner units or of its answers, whichever has more. A ratio of strengths above "
        f"{SCALE_NOTE:g} is worth a look.{_cut(rows)}"
    )
    head = ["Layer and expert", "Mean", "Std", "Strength", "Zeros", "Rows"]
    return html.table(caption, head, rows[:MOST]) if rows else ""


def _one_sided_table(items: Sequence[Degradation]) -> str:
    rows: list[list[str | Cell]] = []
    for item in items:
        for expert, top in enumerate(item.top):
            if expert in item.unused:
                where = f"{item.name}, {experts([expert], names=item.expert_names)}"
                rows.append(
                    [where, "nobody", Cell("0%", "bad"), _percent(float(item.ideal[expert]))]
                )
            if math.isnan(top):
                continue
            column = item.columns[int(item.table[:, expert].argmax())]
            style = "bad" if top >= ONE_SIDED and item.ideal[expert] < 1 else ""
            ideal = _percent(float(item.ideal[expert]))
            rows.append(
                [
                    f"{item.name}, {experts([expert], names=item.expert_names)}",
                    column,
                    Cell(_percent(top), style),
                    ideal,
                ]
            )
    caption = (
        "The column from which an expert's gate weight comes most, and what it would be if the "
        f"expert served alike all for which it is a candidate.{_cut(rows)}"
    )
    head = ["Layer and expert", "Mostly for", "Share", "Ideal"]
    return html.table(caption, head, rows[:MOST]) if rows else ""


def _left_out_table(item: Underfitting | None) -> str:
    if item is None:
        return ""
    if item.private:
        lines: list[list[str | Cell]] = [
            [
                f"{private.task}, layer {private.name}",
                _percent(private.frequency),
                Cell(_percent(private.share), "bad" if private.number < IDLE else ""),
                _percent(private.ideal),
            ]
            for private in item.private
        ]
        head = ["Task and layer", "Share of rows", "Gate weight of own experts", "If even"]
        return html.table("Own experts of each task.", head, lines[:MOST])
    rows: list[list[str | Cell]] = [
        [name, _percent(frequency), _short(float(loss)), f"{weight:.3f}"]
        for name, frequency, loss, weight in zip(
            item.columns, item.frequency, item.loss, item.weight
        )
    ]
    caption = (
        "How often each occurs in held-out data, its loss there, and the gate weight of its rows "
        f"relative to the mean (over layers).{_cut(rows)}"
    )
    head = [item.facet.capitalize(), "Share of rows", "Loss", "Gate weight"]
    return html.table(caption, head, rows[:MOST])


def _cut(rows: Sequence[object]) -> str:
    return f" The first {MOST} of {len(rows)}." if len(rows) > MOST else ""


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ("∞" if value > 0 else "–")
