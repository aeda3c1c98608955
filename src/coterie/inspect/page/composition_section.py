"""What the page says of trained models composed: sentences, findings, the table of steps."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from coterie.inspect.page import html
from coterie.inspect.page.findings import Finding
from coterie.inspect.plots.particles import PLOT
from coterie.inspect.plots.style import Picture
from coterie.inspect.statistics.compositions import lineages, steps_of

if TYPE_CHECKING:
    from coterie.inspect.page.report_data import ReportData

FEW = 0.1
"""Share of particles below which a system stands on too few of them."""


def normalisers(data: ReportData) -> list[float]:
    """log-normaliser of the composition, as each system estimates it."""
    prior = data.composed.log_prior if data.composed is not None else 0.0
    return [prior + value for record in data.particles for value in record["log_ratio"]]


def composed_numbers(data: ReportData) -> dict[str, Any] | None:
    """The section as numbers; None where nothing is composed."""
    if data.composed is None:
        return None
    found = normalisers(data)
    return {
        **vars(data.composed),
        "summary": composed_sentences(data),
        "findings": [vars(finding) for finding in composed_findings(data)],
        "experts": [
            {"name": name, "power": power, "told": told}
            for name, power, told in data.composed.experts
        ],
        "particles": data.particles[0]["particles"] if data.particles else None,
        "systems": sum(record["systems"] for record in data.particles),
        "steps": steps_of(data.particles),
        "ancestors": lineages(data.particles) if data.particles else None,
        "log_normaliser": found,
    }


def composed_sentences(data: ReportData) -> list[str]:
    """What is composed, and how far the particles reach."""
    assert data.composed is not None
    made = data.composed
    experts = "1 expert" if len(made.experts) == 1 else f"{len(made.experts)} experts"
    lines = [f"{experts} composed, mode {made.mode}: samples of {made.target}. All answer always."]
    if not made.corrected:
        lines.append("Without a corrector: the plain sum of scores, whose samples are not of it.")
    if not data.particles:
        return lines
    steps, count = steps_of(data.particles), data.particles[0]["particles"]
    systems = sum(record["systems"] for record in data.particles)
    mean, least = fmean(step["ess"] for step in steps), min(step["ess_least"] for step in steps)
    lines.append(
        f"{systems} systems of {count} particles: effective share {mean:.0%} on average and "
        f"{least:.0%} at its least; "
        f"{lineages(data.particles):.0%} of the first particles have descendants among the samples."
    )
    found = normalisers(data)
    spread = f" ± {stdev(found):.3g} between systems" if len(found) > 1 else ""
    lines.append(f"The log-normaliser of the composition is {fmean(found):.4g}{spread}.")
    return lines


def composed_findings(data: ReportData) -> list[Finding]:
    """Weights that few particles carry, and clamping, which biases."""
    if not data.particles:
        return []
    steps, out = steps_of(data.particles), []
    least, kept = min(step["ess_least"] for step in steps), lineages(data.particles)
    advice = (
        "more particles, powers nearer to those of the experts, or a later start of the weights"
    )
    if least < FEW:
        text = f"Some system once stood on {least:.0%} of its particles: {advice} would help."
        out.append(Finding("note", text))
    if steps[-1]["ess"] < FEW:
        text = (
            f"The last step stood on {steps[-1]['ess']:.0%} of the particles: samples are copies."
        )
        out.append(Finding("alarm", text))
    if kept < FEW:
        text = (
            f"Only {kept:.0%} of the first particles have descendants. Lost in high noise they "
            "cost little, since copies part again; lost late they make samples alike."
        )
        out.append(Finding("note", text))
    clamped = fmean(step["clamped"] for step in steps)
    if clamped > 0:
        text = f"{clamped:.1%} of the changes of weight were cut off, which biases the samples."
        out.append(Finding("note", text))
    if least >= FEW and kept >= FEW and clamped == 0:
        text = (
            f"Every system kept {least:.0%} or more of its particles effective; none was clamped."
        )
        out.append(Finding("good", text))
    return out


def composed_section(data: ReportData, pictures: Mapping[str, Picture]) -> str:
    """Body of the section; "" where nothing is composed."""
    if data.composed is None:
        return ""
    rows = [[name, f"{power:g}", told] for name, power, told in data.composed.experts]
    caption = "Power of each density in the target, and what its model is told."
    out = html.card(html.table(caption, ["Expert", "Power", "Told"], rows))
    if PLOT in pictures:
        out += html.picture(pictures[PLOT], html.details("The numbers", _step_table(data)))
    return out


def _step_table(data: ReportData) -> str:
    rows = [
        [
            f"{step['t']:.4g}",
            f"{step['ess']:.1%}",
            f"{step['ess_least']:.1%}",
            f"{step['max_weight']:.3f}",
            f"{step['ancestors']:.1%}",
            f"{step['resampled']:.0%}",
        ]
        for step in steps_of(data.particles)
    ]
    head = ["Noise level t", "Effective", "least", "Largest weight", "Lineages left", "Resampled"]
    return html.table("Before the resampling of each step, mean over systems.", head, rows)
