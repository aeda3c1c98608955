"""Pictures of how many experts a row uses: over layers, noise levels, classes and positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect.phrases import label_name
from coterie.inspect.plots.positions import face, scene
from coterie.inspect.plots.style import (
    FULL_WIDTH,
    PALETTE,
    Axis,
    Panel,
    Plot,
    depth_colors,
    figure,
    heat_panels,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.statistics.experts_per_row import Amounts
from coterie.inspect.statistics.formulas import Array

MAX_CLASSES = 40
MAX_NUMBERS = 12  # classes up to which the numbers are written into the cells
MAX_POSITIONS = 64


def plot_amounts(amounts: Sequence[Amounts]) -> Plot | None:
    """Only where the number of experts varies between rows of some layer, as all these."""
    if not any(item.varies for item in amounts):
        return None
    noisy = [item for item in amounts if np.isfinite(item.by_noise).sum() > 1]

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        axes = np.atleast_1d(fig.subplots(1, 2 if noisy else 1))
        _by_layer(axes[0], amounts)
        if noisy:
            _by_noise(fig, axes[1], noisy)
        return fig

    least, most = (f(amounts, key=lambda item: item.mean) for f in (min, max))
    right = " Right: the mean at each noise level, one line per layer." if noisy else ""
    return Plot(
        "experts_per_row",
        "Experts per row over layers" + (" and noise levels" if noisy else ""),
        "Dots: mean number of experts a row uses; bars reach up to what 95 of 100 rows need at "
        "most; ticks mark the most that any row needs, which a kernel that pads all rows would pay."
        + right,
        f"Mean experts per row in {len(amounts)} layers: from {least.mean:.2f} in layer "
        f"{least.name} to {most.mean:.2f} in layer {most.name}.",
        draw,
    )


def _by_layer(ax: Any, amounts: Sequence[Amounts]) -> None:
    at = np.arange(len(amounts))
    means = np.array([item.mean for item in amounts])
    ax.vlines(at, means, [item.p95 for item in amounts], color=PALETTE[4], lw=5)
    ax.plot(at, [item.most for item in amounts], "_", color=PALETTE[1], ms=11, mew=1.8)
    ax.plot(at, means, "o", color=PALETTE[0], ms=6)
    shown = sparse_ticks(len(amounts), 12)
    ax.set_xticks(shown, [amounts[i].name for i in shown])
    ax.set_xlim(-0.6, len(amounts) - 0.4)
    ax.set_ylim(0, 1.08 * max(item.most for item in amounts))
    ax.set_xlabel("layer")
    ax.set_ylabel("experts per row")
    ax.grid(axis="y")


def _by_noise(fig: Any, ax: Any, amounts: Sequence[Amounts]) -> None:
    colors = depth_colors(len(amounts))
    for color, item in zip(colors, amounts):
        centres = (np.arange(len(item.by_noise)) + 0.5) / len(item.by_noise)
        ax.plot(centres, item.by_noise, "o-", ms=3.5, color=color, label=f"layer {item.name}")
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("noise level t (0 = data, 1 = noise)")
    ax.set_ylabel("experts per row")
    ax.grid(axis="y")
    handles, labels = ax.get_legend_handles_labels()
    kept = pick(len(handles), 8)
    shown = [handles[i] for i in kept], [labels[i] for i in kept]
    fig.legend(*shown, loc="outside right center")


def plot_amounts_by_class(amounts: Sequence[Amounts], class_names: Sequence[str]) -> Plot | None:
    have = [item for item in amounts if item.varies and np.isfinite(item.by_class).sum() > 1]
    if not have:
        return None
    columns = max(len(item.by_class) for item in have)
    table = np.full((len(have), columns), np.nan)
    for row, item in enumerate(have):
        table[row, : len(item.by_class)] = item.by_class
    kept = _telling(table)
    names = [label_name(c, class_names) for c in kept]
    ticks = {float(i): names[i] for i in sparse_ticks(len(kept), 20)}
    caption = "Mean number of experts that rows of each class use, one line per layer."
    if len(kept) < np.isfinite(table).any(0).sum():
        caption += f" The {len(kept)} classes that differ most."
    return Plot(
        "experts_per_row_by_class",
        "Experts per row over classes",
        caption,
        f"Heat map of {len(have)} layers by {len(kept)} classes; from {np.nanmin(table):.2f} to "
        f"{np.nanmax(table):.2f} experts.",
        lambda: heat_panels(
            [Panel("", table[:, kept])],
            Axis("class", ticks, rotate=any(len(name) > 4 for name in names)),
            Axis("layer", {float(i): item.name for i, item in enumerate(have)}),
            "experts per row",
            (float(np.nanmin(table)), float(np.nanmax(table))),
            numbers=".2f" if len(kept) <= MAX_NUMBERS else "",
        ),
    )


def _telling(table: Array) -> list[int]:
    """Classes with rows; if too many, those farthest from the mean of their layer."""
    seen = np.flatnonzero(np.isfinite(table).any(0))
    far = np.nansum(np.abs(table[:, seen] - np.nanmean(table, axis=1, keepdims=True)), axis=0)
    return sorted(int(i) for i in seen[np.argsort(-far, kind="stable")[:MAX_CLASSES]])


def plot_amounts_by_position(
    amounts: Sequence[Amounts], grid: tuple[int, ...] | None
) -> Plot | None:
    have = [item for item in amounts if item.varies and np.isfinite(item.by_position).sum() > 1]
    if not have:
        return None
    shown = [have[i] for i in pick(len(have))]
    caption = "Mean number of experts that the token at each {} uses." + left_out(len(have))
    alt = f"Mean experts per row by position in {len(shown)} layers."
    name, title = "experts_per_row_by_position", "Experts per row over {}"
    if grid is not None and all(len(item.by_position) == math.prod(grid) for item in have):
        panels = [Panel(f"layer {i.name}", face(i.by_position, grid)) for i in shown]
        values = np.stack([panel.values for panel in panels])
        limits = (float(np.nanmin(values)), float(np.nanmax(values)))
        return Plot(
            name,
            title.format(f"the {scene(grid)[0]}"),
            caption.format("place of the {}{}".format(*scene(grid))),
            alt,
            lambda: heat_panels(
                panels, Axis("column"), Axis("row"), "experts per row", limits, square=True
            ),
        )
    return Plot(
        name,
        title.format("positions"),
        caption.format("position of the sequence")
        + " Long sequences are averaged over neighbours.",
        alt,
        lambda: _curves(shown),
    )


def _curves(amounts: Sequence[Amounts]) -> Any:
    fig = figure(FULL_WIDTH, 2.7)
    ax = fig.subplots()
    for color, item in zip(depth_colors(len(amounts)), amounts):
        groups = np.array_split(item.by_position, min(len(item.by_position), MAX_POSITIONS))
        at = np.cumsum([len(group) for group in groups]) - np.array([len(g) for g in groups]) / 2
        values = [np.nanmean(g) if np.isfinite(g).any() else np.nan for g in groups]
        ax.plot(at, values, color=color, label=f"layer {item.name}")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("position")
    ax.set_ylabel("experts per row")
    ax.grid(axis="y")
    fig.legend(loc="outside right center")
    return fig
