"""How much of many devices an expert-parallel step uses, by the way experts are placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.inspect.plots.style import PALETTE, Plot, figure, render


def draw_placement(rows: Sequence[Mapping[str, Any]], path: Path) -> Plot:
    """A line per strategy over the number of devices, as a PNG file."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))

    def draw() -> Any:
        fig = figure(6.0, 3.2)
        ax = fig.subplots()
        for index, (name, marker) in enumerate(zip(names, "os^Dv", strict=False)):
            own = [row for row in rows if row["strategy"] == name]
            ax.plot(
                [row["devices"] for row in own],
                [row["efficiency"] for row in own],
                marker=marker, color=PALETTE[index], label=name,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({row["devices"] for row in rows}))
        ax.set_xticklabels([str(count) for count in sorted({row["devices"] for row in rows})])
        ax.set_ylim(0.0, 1.05)
        ax.set_xlabel("devices")
        ax.set_ylabel("ideal time / simulated time")
        ax.grid(axis="y")
        ax.legend(frameon=False)
        return fig

    plot = Plot(
        "placement",
        "What placement leaves of the devices",
        "Ideal over simulated time of the expert layers of a step; 1: all devices equally busy.",
        f"Efficiency of {len(names)} ways to place experts on up to "
        f"{max(row['devices'] for row in rows)} devices.",
        draw,
    )
    path.write_bytes(render(plot).light)
    return plot
