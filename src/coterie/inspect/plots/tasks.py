"""Ranking quality (AUC) per task: bars from one half, which is chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coterie.inspect.plots.style import FULL_WIDTH, PALETTE, Plot, figure

CHANCE = 0.5


def plot_tasks(rows: Mapping[str, tuple[float | None, float | None]]) -> Plot:
    """``rows``: (GAUC, AUC) of each task, None where there is none."""
    names = list(rows)
    values = np.array([[np.nan if v is None else v for v in pair] for pair in rows.values()])

    def draw() -> Any:
        fig = figure(FULL_WIDTH * 0.7, 0.8 + 0.55 * len(names))
        ax = fig.subplots()
        place = np.arange(len(names))
        for number, word in enumerate(("GAUC: within each user", "AUC: over all samples")):
            at, height = place + 0.4 * (number - 0.5), 0.36
            kept = np.isfinite(values[:, number])
            width = values[kept, number] - CHANCE
            color = PALETTE[number]
            ax.barh(at[kept], width, height, left=CHANCE, color=color, label=word)
            for y, value in zip(at[kept], values[kept, number]):
                ax.text(value, y, f" {value:.3f}", va="center", fontsize=8)
        ax.set_yticks(place, names)
        ax.invert_yaxis()
        low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0, 1)
        ax.set_xlim(min(CHANCE, low) - 0.02, max(high, CHANCE) + 0.06)
        ax.set_xlabel("share of pairs in the right order")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
        return fig

    told = ", ".join(f"{name} {pair[0]:.3f}" for name, pair in rows.items() if pair[0] is not None)
    return Plot(
        "tasks",
        "How well each task ranks",
        "Share of pairs (a sample with the answer yes, one with no) that the task's score puts in "
        "the right order. Within each user is what a list made for that user is worth.",
        f"GAUC by task: {told}",
        draw,
    )
