"""Plots of the anomaly metrics: output scales, experts of single tasks, neglected tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect.plots.style import (
    ALARM,
    FULL_WIDTH,
    LIGHT,
    PALETTE,
    Axis,
    Panel,
    Plot,
    expert_ticks,
    figure,
    heat_panels,
    in_lines,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.statistics.anomalies import Anomalies, Collapse, Degradation, Underfitting
from coterie.inspect.statistics.formulas import Array

MAX_COLUMNS = 40
MAX_NUMBERS = 12  # experts up to which the shares of few columns are written into the cells
FEW_COLUMNS = 6
NAMES = {"task": "task", "class": "class", "noise": "noise level", "position": "positions"}


def anomaly_plots(found: Anomalies) -> list[Plot | None]:
    return [
        plot_scales(found.collapse),
        plot_one_sided(found.degradation),
        plot_left_out(found.underfitting),
    ]


def plot_scales(items: Sequence[Collapse]) -> Plot | None:
    """Collapse: one dot per expert, in layers."""
    items = [item for item in items if np.nan_to_num(item.answers.scale).any()]
    if not items:
        return None
    worst = max(items, key=lambda item: item.ratio)

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        left, right = fig.subplots(1, 2)
        for place, item in enumerate(items):
            scale = item.answers.scale
            middle = float(np.nanmedian(scale[scale > 0]))
            spread = place + np.linspace(-0.25, 0.25, len(scale))
            relative = np.where(scale > 0, scale, np.nan) / middle
            left.plot(spread, relative, "o", ms=4, color=PALETTE[0], alpha=0.8)
            right.plot(spread, item.answers.zeros, "o", ms=4, color=PALETTE[1], alpha=0.8)
        left.axhline(1.0, color=LIGHT.muted, lw=1, ls="--")
        _log_axis(left)
        left.set_ylabel("strength of answers / median")
        right.axhline(0.9, color=ALARM, lw=1, ls="--")
        right.set_ylim(-0.03, 1.03)
        right.set_ylabel("share of zero activations")
        for ax in (left, right):
            shown = sparse_ticks(len(items), 8)
            ax.set_xticks(shown, [items[i].name for i in shown])
            ax.set_xlim(-0.6, len(items) - 0.4)
            ax.set_xlabel("layer")
            ax.grid(axis="y")
        return fig

    ratio = f"{worst.ratio:.3g}" if math.isfinite(worst.ratio) else "infinitely many"
    return Plot(
        "expert_scales",
        "Collapse: how strongly experts answer",
        "One dot per expert, in its own order. Left: root mean square of its answers to the rows "
        "that chose it, over the median of its layer (1: all alike). Right: the share of its "
        "activations that are zero; above the line an expert says nearly nothing.",
        f"Strip plots over {len(items)} layers; in layer {worst.name} the strongest expert "
        f"answers {ratio} times as strongly as the weakest.",
        draw,
    )


def _log_axis(ax: Any) -> None:
    """Powers of two, or of ten where the values are far apart; never less than 1/2 to 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = np.concatenate([line.get_ydata() for line in ax.lines])
    values = values[np.isfinite(values) & (values > 0)]
    reach = max(2.0, float(values.max()), 1.0 / float(values.min())) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(1 / reach, reach)
    ax.yaxis.set_major_locator(LogLocator(base=2 if reach < 40 else 10))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plot_one_sided(items: Sequence[Degradation]) -> Plot | None:
    """Degradation: the table columns x experts of each layer."""
    items = [item for item in items if np.isfinite(item.table).any()]
    if not items:
        return None
    shown = [items[i] for i in pick(len(items))]
    facet = shown[0].facet
    panels = [
        Panel(in_lines(_title(item)), item.table[kept := pick(len(item.columns), MAX_COLUMNS)],
              expert_ticks(item.expert_names),
              y={float(i): item.columns[kept[i]] for i in sparse_ticks(len(kept), 12)})
        for item in shown
    ]  # fmt: skip
    widest = max(item.table.shape[1] for item in shown)
    small = widest <= MAX_NUMBERS and max(len(item.columns) for item in shown) <= FEW_COLUMNS
    return Plot(
        f"gates_by_{facet}",
        "Degradation: for whom each expert works",
        f"Share of an expert's gate weight (a column adds up to 1) that comes from each "
        f"{NAMES[facet]}, were all of them equally frequent. A column of one colour: the expert "
        "serves all alike; one bright cell: it works for that alone. Grey: hardly used."
        + left_out(len(items)),
        f"Matrices for {len(shown)} layers. " + "; ".join(panel.title for panel in panels[:6]),
        lambda: heat_panels(
            panels,
            Axis("expert", rotate=any(panel.x for panel in panels)),
            Axis(NAMES[facet]),
            "share of gate weight",
            (0.0, max(0.5, *(float(np.nanmax(item.table)) for item in shown))),
            numbers=".0%" if small else "",
        ),
    )


def _title(item: Degradation) -> str:
    most = f": at most {item.number:.0%}" if item.worst is not None else ""
    return f"layer {item.name}{most}"


def plot_left_out(item: Underfitting | None) -> Plot | None:
    """Underfitting: own experts by task; else loss or gate weight against frequency."""
    if item is None:
        return None
    if item.private:
        return _plot_private(item)
    known = np.isfinite(item.loss)
    losses = known.sum() > 1
    values = item.loss if losses else item.weight
    what = "held-out loss" if losses else "gate weight of a row / mean"

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        ax = fig.subplots()
        colors = [PALETTE[5] if rare else PALETTE[0] for rare in item.rare]
        ax.scatter(item.frequency * 100, values, s=26, c=colors)
        if losses:
            ax.set_ylim(0, 1.15 * float(np.nanmax(values)))
        else:
            ax.axhline(1.0, color=LIGHT.muted, lw=1, ls="--")
            ax.set_ylim(0, 1.15 * max(1.0, float(np.nanmax(values))))
        ax.set_xlim(0, 1.15 * float(item.frequency.max()) * 100)
        if len(item.columns) <= 20:
            _name_dots(ax, item.frequency * 100, values, item.columns)
        ax.set_xlabel("share of the rows (%)")
        ax.set_ylabel(what)
        ax.grid(axis="y")
        return fig

    return Plot(
        "left_out",
        "Underfitting: who is left out",
        f"One dot per {NAMES[item.facet]}: how often it occurs, and its {what}"
        + (" (1: as much as the others)." if not losses else ".")
        + " Orange: rare, less than half as often as the mean.",
        f"Scatter plot of {len(item.columns)} dots; {int(item.rare.sum())} of them rare.",
        draw,
    )


def _name_dots(ax: Any, x: Array, y: Array, names: Sequence[str]) -> None:
    """Names beside dots; those of dots that lie close together one below the other or above, with
    a line to their dot. The axes have their limits."""
    across, up = (abs(high - low) for low, high in (ax.get_xlim(), ax.get_ylim()))
    room = (0.025 + 0.009 * max(map(len, names))) * across
    low, high = ax.get_ylim()
    seen = np.flatnonzero(np.isfinite(y))
    taken: list[tuple[float, float]] = []
    for index in seen[np.argsort(-y[seen], kind="stable")]:
        at, own = float(x[index]), float(y[index])
        near = [b for a, b in taken if abs(at - a) < room]
        near += [float(y[i]) for i in seen if 0 < x[i] - at < room]  # dots that it would cover
        free = [
            place
            for place in own + np.arange(-1.0, 1.0, 0.01) * up
            if low <= place <= high and all(abs(place - b) >= 0.085 * up for b in near)
        ]
        place = float(min(free, key=lambda place: abs(place - own), default=own))
        taken.append((at, place))
        line = {"arrowstyle": "-", "color": LIGHT.muted, "lw": 0.5}
        ax.annotate(
            names[index], (at, own), (at + 0.008 * across, place), fontsize=8, va="center",
            arrowprops=line if abs(place - own) > 0.02 * up else None,
            bbox={"facecolor": LIGHT.face, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


def _plot_private(item: Underfitting) -> Plot:
    names = list(dict.fromkeys(private.task for private in item.private))
    layers = list(dict.fromkeys(private.name for private in item.private))

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        ax = fig.subplots()
        width = 0.8 / len(layers)
        for offset, layer in enumerate(layers):
            own = {p.task: p for p in item.private if p.name == layer}
            at = np.array([names.index(task) for task in own]) + (
                (offset - (len(layers) - 1) / 2) * width
            )
            shares = [p.share for p in own.values()]
            ax.bar(at, shares, width * 0.9, color=PALETTE[offset % len(PALETTE)], label=layer)
            ideals = [p.ideal for p in own.values()]
            ax.hlines(ideals, at - width / 2, at + width / 2, color=LIGHT.text, lw=1.2)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("gate weight of own experts")
        ax.grid(axis="y")
        if len(layers) > 1:
            ax.legend(title="layer", ncols=4)
        return fig

    worst = min(item.private, key=lambda private: private.number)
    return Plot(
        "left_out",
        "Underfitting: do tasks use their own experts",
        "Share of each task's gate weight that goes to experts no other task may use; lines: the "
        "share if all its candidates weighed alike. A bar far below its line: the task lives on "
        "what others train.",
        f"Bar chart of {len(names)} tasks; the least, {worst.share:.0%}, for {worst.task}.",
        draw,
    )
