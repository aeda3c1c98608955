"""Plots of the run: loss by noise level, training curves, samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coterie.inspect.phrases import label_name
from coterie.inspect.plots.style import FULL_WIDTH, PALETTE, Plot, depth_colors, figure

MAX_SAMPLES = 60
MAX_CURVES = 6


def plot_loss_bins(bins: Sequence[Mapping[str, Any]], unit: str) -> Plot | None:
    known = [b for b in bins if b.get("loss") is not None and math.isfinite(float(b["loss"]))]
    if not known:
        return None

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.7)
        ax = fig.subplots()
        low = np.array([float(b["lo"]) for b in known])
        width = np.array([float(b["hi"]) for b in known]) - low
        ax.bar(low + width / 2, [float(b["loss"]) for b in known], width * 0.92, color=PALETTE[0])
        ax.set_xlabel("noise level t (0 = data, 1 = noise)")
        ax.set_ylabel("loss")
        ax.set_xlim(min(low), max(low + width))
        ax.grid(axis="y")
        return fig

    worst = max(known, key=lambda b: float(b["loss"]))
    return Plot(
        "loss_by_noise",
        "Loss over noise levels",
        f"Unweighted loss on held-out data, mean of each noise bin, in {unit}.",
        f"Bar chart of {len(known)} noise bins; highest {float(worst['loss']):.4g} for t from "
        f"{float(worst['lo']):.2g} to {float(worst['hi']):.2g}.",
        draw,
    )


def curve_series(curve: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Numeric entries of the metrics log by name: (steps, values), the loss first.

    Nested records become ``a/b``; the machine's own (speed, memory) are left out.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for index, row in enumerate(curve):
        step = row.get("step", index)
        for key, value in _flat(row):
            if key == "step" or key.startswith("machine/") or not math.isfinite(value):
                continue
            steps, values = found.setdefault(key, ([], []))
            steps.append(float(step))
            values.append(value)
    moving = {key: both for key, both in found.items() if len(both[1]) > 1}
    return dict(sorted(moving.items(), key=lambda pair: (_rank(pair[0]), pair[0])))


def _rank(key: str) -> int:
    order = ("loss", "losses/", "aux/", "experts/", "grad_norm", "lr")
    return next((i for i, start in enumerate(order) if key.startswith(start)), len(order))


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out.append((f"{prefix}{key}", float(value)))
    return out


def curve_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Quantities that exist once per layer share a panel; a constant count of experts is none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith("/experts"):
            groups.setdefault(re.sub(r"/layer\d+(/round\d+)?", "", name), []).append(name)
    return groups


def plot_curves(curve: Sequence[Mapping[str, Any]]) -> Plot | None:
    series = curve_series(curve)
    groups = curve_groups(series)
    if not groups:
        return None
    shown = list(groups)[:MAX_CURVES]

    def draw() -> Any:
        columns = min(3, len(shown))
        lines = math.ceil(len(shown) / columns)
        fig = figure(max(4.6, FULL_WIDTH * columns / 3), 2.2 * lines + 0.2)
        axes = fig.subplots(lines, columns, squeeze=False)
        for ax, key in zip(axes.flat, shown):
            colors = depth_colors(len(groups[key]))
            for color, name in zip(colors, groups[key]):
                _curve(ax, *series[name], color)
            _scale(ax, [v for name in groups[key] for v in series[name][1]])
            ax.set_title(key if len(key) < 34 else f"{key[:31]}...")
            ax.grid(axis="y")
            ax.set_xlabel("step")
        for ax in list(axes.flat)[len(shown) :]:
            ax.set_visible(False)
        return fig

    rest = len(groups) - len(shown)
    first = series[groups[shown[0]][0]][1]
    return Plot(
        "training",
        "Training curves",
        "Logged quantities over training steps; long logs are drawn pale with their moving average "
        "on top. Quantities of several layers share a panel, one line per layer."
        + (f" {rest} more are in the data file." if rest > 0 else ""),
        f"Line charts of {', '.join(shown)}. {shown[0]}: from {first[0]:.4g} to {first[-1]:.4g}.",
        draw,
    )


def _curve(ax: Any, steps: Sequence[float], values: Sequence[float], color: Any) -> None:
    if len(values) < 200:
        ax.plot(steps, values, color=color, lw=1.5)
        return
    ax.plot(steps, values, color=color, lw=0.7, alpha=0.3)
    width = len(values) // 40
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    start = (width - 1) // 2
    ax.plot(steps[start : start + len(smooth)], smooth, color=color, lw=1.7)


def _scale(ax: Any, values: Sequence[float]) -> None:
    low, high = np.quantile(values, [0.01, 0.99])
    if min(values) == max(values):
        ax.set_ylim(min(0.0, 2 * min(values)), max(0.0, 2 * max(values)) or 1.0)
    elif min(values) > 0 and high > 30 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")


def plot_samples(
    images: np.ndarray, labels: Sequence[int] | None, class_names: Sequence[str]
) -> Plot:
    """``images`` u8 [n, h, w, c] with 1, 3 or 4 channels; fewer and larger where they are wide."""
    height, width = images.shape[1:3]
    wide = max(1.0, width / height)
    shown = images[: max(1, round(MAX_SAMPLES / wide))]
    count, channels = len(shown), shown.shape[3]

    def draw() -> Any:
        columns = min(count, max(1, round(10 / wide)))
        lines = math.ceil(count / columns)
        tile = min(1.5 * wide, FULL_WIDTH / columns)
        label = 0.22 if labels is not None else 0.0
        fig = figure(columns * tile, lines * (tile * height / width + label))
        ax = fig.subplots()
        ax.set_axis_off()
        # All tiles in one coordinate system, one unit wide: an axes per tile would be slow.
        row = (height / width + label / tile) * 1.06
        for index in range(count):
            x, y = index % columns * 1.06, -(index // columns) * row
            pixels = shown[index, :, :, 0] if channels == 1 else shown[index]
            options = {"cmap": "gray", "vmin": 0, "vmax": 255} if channels == 1 else {}
            box = (x, x + 1, y - height / width, y)
            ax.imshow(pixels, interpolation="nearest", extent=box, **options)
            if labels is not None:
                text = label_name(int(labels[index]), class_names)[:14]
                ax.text(x + 0.5, y + 0.03, text, fontsize=8, ha="center")
        ax.set_xlim(0, columns * 1.06 - 0.06)
        ax.set_ylim(-(lines - 1) * row - height / width, 0.04 + label / tile)
        return fig

    more = f" The first {count} of {len(images)}." if len(images) > count else ""
    return Plot(
        "samples",
        "Samples",
        "Drawn from the model, not selected." + more,
        f"{count} generated images of {height} by {width} pixels.",
        draw,
    )


def plot_points(points: np.ndarray, labels: Sequence[int] | None) -> Plot:
    """``points`` float [n, 2]."""

    def draw() -> Any:
        fig = figure(4.6, 4.4)
        ax = fig.subplots()
        color: Any = PALETTE[0]
        if labels is not None:
            color = [PALETTE[int(label) % len(PALETTE)] for label in labels]
        ax.scatter(points[:, 0], points[:, 1], s=6, c=color, alpha=0.7, linewidths=0)
        ax.set_aspect("equal", "datalim")
        ax.grid()
        return fig

    return Plot(
        "samples",
        "Samples",
        "Points drawn from the model, not selected; colours are classes where there are any.",
        f"Scatter of {len(points)} generated points in the plane.",
        draw,
    )
