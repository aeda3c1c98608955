"""Plot of particle weights, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coterie.inspect.plots.style import FULL_WIDTH, PALETTE, Plot, figure
from coterie.inspect.statistics.compositions import steps_of

PLOT = "particles"


def plot_particles(particles: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Effective share and lineages over the noise; None without particles."""
    if not particles:
        return None
    steps = steps_of(particles)

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        left, right = fig.subplots(1, 2)
        t = np.arange(1, len(steps) + 1)
        left.fill_between(
            t, [s["ess_least"] for s in steps], [s["ess"] for s in steps],
            color=PALETTE[4], alpha=0.35, lw=0,
        )  # fmt: skip
        left.plot(t, [s["ess"] for s in steps], color=PALETTE[0], lw=1.8, label="effective share")
        left.plot(
            t, [s["max_weight"] for s in steps],
            color=PALETTE[1], lw=1.8, ls="--", label="largest weight",
        )  # fmt: skip
        right.step(t, [s["ancestors"] for s in steps], where="mid", color=PALETTE[2], lw=1.8)
        for ax in (left, right):
            ax.set_xlim(0.5, len(steps) + 0.5)
            ax.set_ylim(0.0, 1.05)
            ax.set_xlabel("sampling step")
            ax.grid(axis="y")
        left.set_ylabel("share")
        left.legend(frameon=False)
        right.set_ylabel("lineages left")
        return fig

    last = steps[-1]
    return Plot(
        PLOT,
        "Who has weight: particles, step by step",
        "Left: effective share of a system's particles (line: mean over systems; shade: down to "
        "the least) and the largest single weight, before each resampling. Right: share of the "
        "first particles that still have descendants.",
        f"Over {len(steps)} steps the effective share ends at {last['ess']:.0%} and "
        f"{last['ancestors']:.0%} of the lineages are left.",
        draw,
    )
