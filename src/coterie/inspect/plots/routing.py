"""Plots of expert use by noise level, class and sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect.phrases import listing
from coterie.inspect.plots.style import (
    FULL_WIDTH,
    LIGHT,
    PALETTE,
    Axis,
    Panel,
    Plot,
    expert_ticks,
    figure,
    heat_panels,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import RouterTrace
from coterie.inspect.statistics.formulas import Array
from coterie.inspect.statistics.routers import FACETS, RouterStats
from coterie.inspect.statistics.trace import Trace

MAX_CLASSES = 40
FACET_COLORS = dict(zip(FACETS, PALETTE))
OF_A_ROW = {
    "noise": "the noise level",
    "class": "the class",
    "position": "the position",
    "task": "the task",
}
SHARE = "share of choices"
NOTHING, LEAST_BITS = 5e-4, 0.05
"""Bits below which there is no picture, and what its axis reaches at least."""


def plot_information(items: Sequence[RouterStats]) -> Plot | None:
    items = [item for item in items if item.information and item.num_experts > 1]
    told = [info.corrected for item in items for info in item.information.values()]
    if max(told, default=0.0) < NOTHING:
        return None

    best = max(items, key=lambda item: max(info.bits for info in item.information.values()))
    facet, info = max(best.information.items(), key=lambda pair: pair[1].bits)
    known = [OF_A_ROW[f] for f in FACETS if any(f in item.information for item in items)]
    return Plot(
        "information",
        "What the choice of expert tells",
        f"Mutual information between the expert of a choice and {listing(known)} of its row, one "
        "group per layer. 0 bits: the expert is chosen without regard to it. The short line is "
        "what unrelated variables give by chance; a bar below it is drawn pale and is not "
        "evidence.",
        f"Bar chart over {len(items)} layers. Highest: {facet} in layer {best.name}, "
        f"{info.corrected:.2f} bits.",
        lambda: _draw_information(items),
    )


def _draw_information(items: Sequence[RouterStats]) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fig = figure(FULL_WIDTH, 3.1)
    ax = fig.subplots()
    facets = [f for f in FACETS if any(f in item.information for item in items)]
    width = 0.8 / len(facets)
    for offset, facet in enumerate(facets):
        at = np.arange(len(items)) + (offset - (len(facets) - 1) / 2) * width
        for place, item in zip(at, items):
            info = item.information.get(facet)
            _information_bar(ax, float(place), width, info, FACET_COLORS[facet])
    tallest = max(i.corrected for item in items for i in item.information.values())
    ax.set_ylim(0, max(tallest, LEAST_BITS) * 1.08)
    ax.set_xlim(-0.6, len(items) - 0.4)
    shown = sparse_ticks(len(items), max(4, 90 // max(len(item.name) for item in items)))
    ax.set_xticks(shown, [items[i].name for i in shown])
    ax.set_xlabel("layer")
    ax.set_ylabel("information (bits)")
    ax.grid(axis="y")
    handles: list[Any] = [Patch(color=FACET_COLORS[facet], label=facet) for facet in facets]
    handles.append(Line2D([], [], color=LIGHT.text, lw=1.1, label="chance"))
    ax.legend(handles=handles, ncols=4, loc="lower right", bbox_to_anchor=(1, 1.0))
    return fig


def _information_bar(ax: Any, at: float, width: float, info: Any, color: str) -> None:
    if info is None:
        return
    ax.bar(at, info.corrected, width * 0.92, color=color, alpha=1.0 if info.measurable else 0.3)
    ax.hlines(info.floor, at - width * 0.46, at + width * 0.46, color=LIGHT.text, lw=1.1)


def plot_noise(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    several = [r.noise.rows[r.main] * r.noise.varies for r in routers]
    tables = [r.shares(r.noise)[r.main] for r in routers]
    panels = share_panels(tables, several, names, [r.expert_names for r in routers])
    if not panels:
        return None
    bins = routers[0].noise_bins
    x = Axis("noise level t", {-0.5: "0", bins / 2 - 0.5: "0.5", bins - 0.5: "1"})
    return heat_plot(
        "expert_by_noise",
        "Experts over noise levels",
        f"Share of the choices of {bins} noise bins that go to each expert; a column adds up to 1. "
        "Vertical change means that experts specialise in noise levels; horizontal stripes mean "
        "that they do not. Grey: no rows.",
        panels,
        x,
        len(names),
    )


def plot_classes(
    routers: Sequence[RouterTrace], names: Sequence[str], class_names: Sequence[str]
) -> Plot | None:
    """Conditional columns, then one for the unconditional rows."""
    have = [i for i, r in enumerate(routers) if r.classes.rows[0].any()]
    if not have:
        return None
    columns = max(routers[i].classes.columns for i in have)
    null = any(routers[i].classes.rows[1].any() for i in have)
    kept = _telling_classes([routers[i] for i in have], columns)
    panels = []
    for i in have:
        router = routers[i]
        counts = np.zeros((columns + 1, router.num_experts))
        counts[: router.classes.columns] = router.shares(router.classes)[0]
        counts[columns] = router.shares(router.classes)[1].sum(0)
        shown_columns = [*kept, columns] if null else kept
        panels.append(_share_panel(names[i], counts[shown_columns], router.expert_names))
    labels = [class_names[c] if c < len(class_names) else str(c) for c in kept]
    ticks = {float(i): labels[i] for i in sparse_ticks(len(kept), 20)}
    rotate = any(len(text) > 2 for text in ticks.values())
    caption = "Share of the choices of each class that go to each expert"
    if null:
        ticks[float(len(kept))] = "∅"
        caption += "; the last column, ∅, is unconditional"
    caption += ". Columns that look alike mean that the class does not decide."
    if len(kept) < columns:
        caption += f" {len(kept)} of {columns} classes: those that differ most from the mean."
    shown = pick(len(panels))
    return heat_plot(
        "expert_by_class",
        "Experts over classes",
        caption,
        [panels[i] for i in shown],
        Axis("class", ticks, rotate),
        len(panels),
    )


def plot_steps(trace: Trace, names: dict[Any, str]) -> Plot | None:
    places = [r.place for r in trace.routers if r.place in trace.steps]
    places += [place for place in trace.steps if place not in places]
    steps = [trace.steps[place] for place in places]
    named = {router.place: router.expert_names for router in trace.routers}
    panels = share_panels(
        [step.counts for step in steps],
        [step.rows_seen for step in steps],
        [names.get(place, str(place.layer)) for place in places],
        [named.get(place, ()) for place in places],
    )
    if not panels:
        return None
    return heat_plot(
        "expert_by_step",
        "Experts along sampling",
        "Share of the choices of every sampling step that go to each expert, conditional and "
        "unconditional rows together. Step 0 is the noisiest.",
        panels,
        Axis("sampling step"),
        len(places),
    )


def _telling_classes(routers: Sequence[RouterTrace], columns: int) -> list[int]:
    """Classes that were seen; if too many, those whose load is farthest from the mean load."""
    far, seen = np.zeros(columns), np.zeros(columns)
    for router in routers:
        counts = router.shares(router.classes)[0]
        seen[: len(counts)] += router.classes.rows[0]
        distance = np.abs(formulas.load_share(counts) - formulas.load_share(counts.sum(0))).sum(1)
        far[: len(counts)] += distance
    known = np.flatnonzero(seen)
    best = known[np.argsort(-far[known], kind="stable")[:MAX_CLASSES]]
    return sorted(int(i) for i in best)


def _share_panel(name: str, counts: Array, experts: Sequence[str]) -> Panel:
    share = formulas.load_share(counts)
    share[counts.sum(1) == 0] = np.nan
    return Panel(f"layer {name}", share.T, y=expert_ticks(experts))


def share_panels(
    tables: Sequence[Array],
    rows: Sequence[Array],
    names: Sequence[str],
    experts: Sequence[Sequence[str]],
) -> list[Panel]:
    have = [i for i in range(len(tables)) if rows[i].any()]
    shown = [have[i] for i in pick(len(have))]
    return [_share_panel(names[i], tables[i], experts[i]) for i in shown]


def heat_plot(
    name: str, title: str, caption: str, panels: Sequence[Panel], x: Axis, count: int
) -> Plot:
    return Plot(
        name,
        title,
        caption + left_out(count),
        f"Heat maps of {SHARE}, expert by {x.label}, for {len(panels)} layers. "
        + "; ".join(_peak(panel) for panel in panels[:6]),
        lambda: heat_panels(panels, x, Axis("expert"), SHARE),
    )


def _peak(panel: Panel) -> str:
    if not np.isfinite(panel.values).any():
        return f"{panel.title}: no choices"
    row, column = np.unravel_index(int(np.nanargmax(panel.values)), panel.values.shape)
    peak = panel.values[row, column]
    expert = (panel.y or {}).get(float(row), str(row))
    return f"{panel.title}: at most {peak:.0%} (expert {expert}, column {column})"
