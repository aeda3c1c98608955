"""Point clouds as a page of pictures: one camera for all, near points bright and on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect.phrases import label_name
from coterie.inspect.plots.style import COLORMAP, FULL_WIDTH, Plot, figure
from coterie.inspect.statistics.formulas import Array

MAX_CLOUDS = 48
MAX_POINTS = 1024  # drawn of one cloud
TURN, RAISE = math.radians(35), math.radians(20)  # of the camera, about and above the floor


def project(clouds: Array) -> tuple[Array, Array]:
    """Clouds [n, P, 3], y upwards, as seen by the camera: places [n, P, 2] and nearness [n, P]."""
    x, y, z = np.moveaxis(clouds, -1, 0)
    across = x * math.cos(TURN) + z * math.sin(TURN)
    towards = z * math.cos(TURN) - x * math.sin(TURN)
    up = y * math.cos(RAISE) - towards * math.sin(RAISE)
    near = towards * math.cos(RAISE) + y * math.sin(RAISE)
    return np.stack([across, up], axis=-1), near


def plot_clouds(clouds: Array, labels: Sequence[int] | None, class_names: Sequence[str]) -> Plot:
    """``clouds`` float [n, P, 3]; the first :data:`MAX_CLOUDS` are drawn, each in its own tile."""
    count = min(len(clouds), MAX_CLOUDS)
    kept = np.linspace(0, clouds.shape[1] - 1, min(clouds.shape[1], MAX_POINTS)).round().astype(int)
    shown = clouds[:count, kept].astype(np.float64)
    shown -= (shown.min(axis=1, keepdims=True) + shown.max(axis=1, keepdims=True)) / 2
    # A stray point must not shrink all others to a dot.
    reach = float(np.quantile(np.linalg.norm(shown, axis=2), 0.995)) or 1.0

    def draw() -> Any:
        columns = min(count, 8)
        lines = math.ceil(count / columns)
        row = 1.0 if labels is None else 1.12
        tile = min(1.5, FULL_WIDTH / columns)
        fig = figure(columns * tile, lines * tile * row)
        ax = fig.subplots()
        ax.set_axis_off()
        at, near = project(np.clip(shown / (2.1 * reach), -0.5, 0.5))
        near -= near.min(axis=1, keepdims=True)
        near /= np.maximum(near.max(axis=1, keepdims=True), 1e-12)
        corner = np.array([[i % columns, -(i // columns) * row] for i in range(count)])
        at = (at + corner[:, None] + (0.5, -0.5)).reshape(-1, 2)
        order = np.argsort(near, axis=None, kind="stable")
        size = tile**2 * min(8.0, max(1.0, 1500 / len(kept)))
        ax.scatter(*at[order].T, c=near.ravel()[order], s=size, cmap=_shades(), linewidths=0)
        if labels is not None:
            for (x, y), label in zip(corner, labels, strict=False):
                name = label_name(int(label), class_names)[:14]
                ax.text(x + 0.5, y - 0.02, name, fontsize=8, ha="center", va="bottom")
        ax.set_xlim(0, columns)
        ax.set_ylim(-lines * row + (row - 1), row - 1)
        ax.set_aspect("equal")
        return fig

    more = f" The first {count} of {len(clouds)}." if len(clouds) > count else ""
    return Plot(
        "samples",
        "Samples",
        "Point clouds drawn from the model, not selected, all seen from the same side; brighter "
        f"points are nearer.{more}",
        f"{count} generated clouds of {clouds.shape[1]} points.",
        draw,
    )


def _shades() -> Any:
    """The colour map without its ends, which vanish on a dark and on a light page."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps[COLORMAP](np.linspace(0.1, 0.92, 64)))
