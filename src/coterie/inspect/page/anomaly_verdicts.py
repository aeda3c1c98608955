"""A sentence for each anomaly metric: the number, its ideal, and whether it is a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coterie.inspect.page.findings import Finding, Level, experts
from coterie.inspect.phrases import expert_name, listing
from coterie.inspect.statistics.anomalies import Anomalies, Degradation, Underfitting

Meter = Literal["Collapse", "Degradation", "Underfitting"]
SCALE_NOTE, SCALE_ALARM = 10.0, 50.0
"""Largest over smallest scale of a layer's answers above which gates weigh them unfairly."""
ZEROS = 0.9
"""Share of zero activations above which an expert says nothing."""
ONE_SIDED = 0.9
"""Share of an expert's gate weight from one column above which it works for that alone."""
IDLE = 0.25
"""Gate weight of own experts, relative to an even one, below which they are idle."""
HARDER = 1.5
"""Loss of rare columns over that of the others above which they are starved."""
LIGHT = 0.5
"""Gate weight of a row, relative to the mean, below which its column is starved."""
ONE = {"task": "task", "class": "class", "noise": "noise level", "position": "stretch of positions"}
MANY = {"task": "tasks", "class": "classes", "noise": "noise levels", "position": "positions"}


@dataclass(frozen=True)
class Verdict:
    """``number`` is NaN where the meter cannot be read, ``text`` then says why."""

    meter: Meter
    number: float
    ideal: float
    level: Level
    text: str

    @property
    def finding(self) -> Finding:
        return Finding(self.level, f"{self.meter}: {self.text}")


def verdicts(found: Anomalies) -> list[Verdict]:
    """One per meter; [] for a dense model."""
    if not found.routed:
        return []
    return [_collapse(found), _degradation(found), _underfitting(found.underfitting)]


def summary(said: Sequence[Verdict]) -> list[Finding]:
    """What is wrong or not to be read, each for itself, and what is in order in one line."""
    fine = [verdict.meter.lower() for verdict in said if verdict.level == "good"]
    out = [verdict.finding for verdict in said if verdict.level != "good"]
    if fine:
        out.append(Finding("good", f"No {listing(fine, 'or')} of experts."))
    return out


def _collapse(found: Anomalies) -> Verdict:
    items = [item for item in found.collapse if not math.isnan(item.ratio)]
    if not items:
        text = (
            "not measured: no answers of an expert layer were looked at (experts that are whole "
            "models, or their features, are in none)."
        )
        return Verdict("Collapse", math.nan, 1.0, "note", text)
    empty = [item for item in items if item.zeros > ZEROS]
    worst = max(items, key=lambda item: item.ratio)
    if empty:
        first = max(empty, key=lambda item: item.zeros)
        more = f" So in {len(empty)} layers." if len(empty) > 1 else ""
        text = (
            f"{first.zeros:.0%} of the activations of expert {first.emptiest} in layer "
            f"{first.name} are zero.{more}"
        )
        return Verdict("Collapse", worst.ratio, 1.0, "alarm", text)
    if worst.ratio > SCALE_NOTE:
        many = sum(item.ratio > SCALE_NOTE for item in items)
        times = f"{worst.ratio:.3g} times as strongly as" if math.isfinite(worst.ratio) else ""
        said = times or "at all, unlike"
        text = (
            f"in layer {worst.name} expert {worst.strongest} answers {said} expert "
            f"{worst.weakest} (ideal: 1 time), so equal gates do not weigh them equally"
        )
        text += f"; so in {many} of {len(items)} layers." if many > 1 else "."
        level: Level = "alarm" if worst.ratio > SCALE_ALARM else "note"
        return Verdict("Collapse", worst.ratio, 1.0, level, text)
    zeros = max(item.zeros for item in items)
    text = (
        f"none. The strongest expert of a layer answers at most {worst.ratio:.2g} times as "
        f"strongly as the weakest (layer {worst.name}; ideal: 1), and at most {zeros:.0%} of an "
        "expert's activations are zero."
    )
    return Verdict("Collapse", worst.ratio, 1.0, "good", text)


def _degradation(found: Anomalies) -> Verdict:
    items = [item for item in found.degradation if item.worst is not None]
    if not items:
        text = "not measurable: no expert is used often enough by rows that differ."
        return Verdict("Degradation", math.nan, math.nan, "note", text)
    if lost := [item for item in items if item.unused]:
        return _unused(lost)
    worst = max(items, key=lambda item: item.number)
    ideal = float(worst.ideal[worst.worst or 0])
    who = expert_name(worst.worst or 0, worst.expert_names)
    said = (
        f"expert {who} of layer {worst.name} takes {worst.number:.0%} of its gate weight "
        f"from {_named(worst.facet, worst.column)} ({ideal:.0%} if it served all "
        f"{MANY[worst.facet]} alike)"
    )
    if worst.number < ONE_SIDED or len(worst.columns) < 2:
        text = f"none. No expert works for one {ONE[worst.facet]} alone: at most, {said}."
        return Verdict("Degradation", worst.number, ideal, "good", text)
    if worst.facet == "noise" and worst.unit == "sample":
        text = f"experts divide the noise levels, as routers that see nothing else do: {said}."
        return Verdict("Degradation", worst.number, ideal, "good", text)
    many = sum(_one_sided(item) for item in items)
    more = f" In all {many} experts work for one {ONE[worst.facet]}." if many > 1 else ""
    meant = worst.facet != "task"
    if meant:
        more += f" That is a fault only if it was meant to serve several {MANY[worst.facet]}."
    level: Level = "note" if meant or worst.unit == "sample" else "alarm"
    return Verdict("Degradation", worst.number, ideal, level, f"{said}.{more}")


def _unused(items: Sequence[Degradation]) -> Verdict:
    """Experts that work for nobody: worse than for one alone."""
    first = max(items, key=lambda item: len(item.unused))
    verb = "works" if len(first.unused) == 1 else "work"
    who = experts(first.unused, names=first.expert_names)
    text = f"{who} of layer {first.name} {verb} for no {ONE[first.facet]} at all."
    if len(items) > 1:
        text += f" So in {len(items)} layers."
    ideal = 1.0 / max(1, len(first.columns))
    return Verdict("Degradation", 0.0, ideal, "alarm", text)


def _named(facet: str, column: str) -> str:
    if facet == "noise":
        return f"noise levels {column.removeprefix('t ')}"
    return f"positions {column}" if facet == "position" else f"{ONE[facet]} {column}"


def _one_sided(item: Degradation) -> int:
    """Experts for several columns that work for one."""
    return int(np.sum((np.nan_to_num(item.top) >= ONE_SIDED) & (item.ideal < 1)))


def _underfitting(item: Underfitting | None) -> Verdict:
    if item is None:
        text = "not measurable: too few rows, or they differ in nothing that was recorded."
        return Verdict("Underfitting", math.nan, 1.0, "note", text)
    if item.private:
        return _own_experts(item)
    ratio, weight = item.loss_ratio, float(item.weight[item.least])
    what, many = ONE[item.facet], MANY[item.facet]
    rare = [name for name, is_rare in zip(item.columns, item.rare) if is_rare]
    light = (
        f"a row of {_named(item.facet, item.columns[item.least])} has {weight:.2g} times the "
        "mean gate weight (ideal: 1)"
    )
    if not math.isnan(ratio):
        said = f"the loss of rare {many} ({_some(rare)}) is {ratio:.2g} times that of the others"
        if ratio > HARDER:
            text = f"{said} (ideal: 1), and {light}."
            return Verdict("Underfitting", ratio, 1.0, "note", text)
        text = f"none. The {said.removeprefix('the ')} (ideal: 1)."
        return Verdict("Underfitting", ratio, 1.0, "good", text)
    if weight < LIGHT:
        text = f"{light}: experts hardly add to this {what}."
        return Verdict("Underfitting", weight, 1.0, "note", text)
    equal = not rare and item.facet in ("task", "class")
    even = f" All {many} are about equally frequent." if equal else ""
    text = f"none. No {what} is left out: at the least, {light}.{even}"
    return Verdict("Underfitting", weight, 1.0, "good", text)


def _own_experts(item: Underfitting) -> Verdict:
    worst = min(item.private, key=lambda private: private.number)
    said = (
        f"task {worst.task} gives {worst.share:.0%} of its gate weight in layer {worst.name} to "
        f"its own experts ({worst.ideal:.0%} if all candidates weighed alike; the task has "
        f"{worst.frequency:.0%} of the rows)"
    )
    if worst.number < IDLE:
        text = f"{said}: they are idle."
        return Verdict("Underfitting", worst.number, 1.0, "alarm", text)
    text = f"none. Every task uses its own experts: at the least, {said}."
    return Verdict("Underfitting", worst.number, 1.0, "good", text)


def _some(names: list[str], most: int = 3) -> str:
    if len(names) <= most:
        return listing(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
