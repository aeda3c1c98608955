"""The picture of a sweep: quality against cost of one model under other routing settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coterie.inspect.plots.style import ALARM, FULL_WIDTH, LIGHT, PALETTE, Plot, figure

MANY = 4
"""More classes than this do not get a line each."""


def plot_sweep(rows: Sequence[Mapping[str, Any]], unit: str) -> Plot:
    """``rows``: {settings, trained, held_out_loss, experts_per_row, by_class}; ``unit`` of loss."""
    rows = sorted(rows, key=lambda row: float(row["experts_per_row"]))
    classes = list(rows[0]["by_class"])
    classes = classes if 1 < len(classes) <= MANY else []

    def draw() -> Any:
        fig = figure(FULL_WIDTH if classes else 5.6, 3.4)
        axes = np.atleast_1d(fig.subplots(1, 2 if classes else 1))
        x = [row["experts_per_row"] for row in rows]
        axes[0].plot(x, [row["held_out_loss"] for row in rows], "o-", color=PALETTE[0])
        axes[0].set_ylabel(f"held-out loss ({unit})")
        _mark(axes[0], rows)
        if classes:
            _changes(fig, axes[1], rows, classes)
        for ax in axes:
            ax.set_xlabel("experts per row (mean)")
            ax.grid(axis="y")
            ax.margins(x=0.1, y=0.2)
        return fig

    low, high = rows[0], rows[-1]
    paths = " and ".join(rows[0]["settings"])
    return Plot(
        "sweep",
        f"Quality and cost over {paths}",
        "Held-out loss of the trained model under other settings of its routers, against the mean "
        "number of experts a row uses. Circle: as trained. Right: what each class gains or loses.",
        f"Line chart of {len(rows)} settings: loss {low['held_out_loss']:.4g} with "
        f"{low['experts_per_row']:.3g} experts per row, {high['held_out_loss']:.4g} with "
        f"{high['experts_per_row']:.3g}.",
        draw,
    )


def _changes(fig: Any, ax: Any, rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    base = next(row["by_class"] for row in rows if row["trained"])
    for color, name in zip(PALETTE[1:], classes):
        values = [row["by_class"][name] - base[name] for row in rows]
        x = [row["experts_per_row"] for row in rows]
        ax.plot(x, values, "o-", ms=4, color=color, label=name)
    ax.axhline(0.0, color=LIGHT.muted, lw=1, ls="--")
    ax.set_ylabel("change of the loss")
    fig.legend(loc="outside right center")


def _mark(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Name each setting, in turn to the left and to the right, and circle the trained one."""
    for index, row in enumerate(rows):
        at = (row["experts_per_row"], row["held_out_loss"])
        text = ", ".join("-" if v is None else str(v) for v in row["settings"].values())
        ax.annotate(
            text,
            at,
            (9 if index % 2 else -9, 3),
            textcoords="offset points",
            fontsize=8,
            ha="left" if index % 2 else "right",
            color=LIGHT.text,
        )
        if row["trained"]:
            ax.plot(*at, "o", ms=11, mfc="none", mec=ALARM, mew=1.6)
