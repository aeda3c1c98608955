"""Plots of relations: experts of successive routers, experts of tasks, experts with similar
outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coterie.inspect.plots.style import (
    FULL_WIDTH,
    LIGHT,
    PALETTE,
    Axis,
    Panel,
    Plot,
    figure,
    heat_panels,
    in_lines,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.statistics.accumulators import Place
from coterie.inspect.statistics.formulas import Array, off_diagonal_mean
from coterie.inspect.statistics.pairs import PairStats
from coterie.inspect.statistics.pools import PoolStats

MOST_OWNERS = 12  # owners up to which the shares are written into the cells


def plot_rounds(pairs: Sequence[PairStats]) -> Plot | None:
    have = [pair for pair in pairs if pair.kind == "round" and np.isfinite(pair.lift).any()]
    return _lift_plot(
        have,
        "rounds",
        "From round to round",
        "expert of the next round",
        "expert of the round",
        "How much more often an expert of one round (rows) is followed by an expert of the next "
        "round (columns) than their loads explain: 1 is chance, 2 twice as often. A bright "
        "diagonal: the same experts answer again.",
        [f"layer {pair.name}, {pair.overlap:.0%} stay" for pair in have],
    )


def plot_adjacent(pairs: Sequence[PairStats]) -> Plot | None:
    have = [pair for pair in pairs if pair.kind == "layer" and np.isfinite(pair.lift).any()]
    known = [(pair, pair.information) for pair in have]
    return _lift_plot(
        have,
        "adjacent_layers",
        "From layer to layer",
        "expert of the next layer",
        "expert of the layer",
        "How much more often an expert of one layer (rows) is followed, for the same row, by an "
        "expert of the next layer (columns) than their loads explain: 1 is chance. Above each "
        "map the information between the two first choices: 0 bits, the layers decide apart.",
        [f"{p.name}: {i.corrected:.2f} bits" if i else p.name for p, i in known],
    )


def _lift_plot(
    pairs: Sequence[PairStats],
    name: str,
    title: str,
    x: str,
    y: str,
    caption: str,
    titles: Sequence[str],
) -> Plot | None:
    if not pairs:
        return None
    shown = pick(len(pairs))
    panels = [Panel(in_lines(titles[i]), pairs[i].lift) for i in shown]
    finite = np.concatenate([panel.values[np.isfinite(panel.values)] for panel in panels])
    top = max(2.0, float(np.quantile(finite, 0.99)))
    return Plot(
        name,
        title,
        caption + left_out(len(pairs)),
        f"Matrices of lift for {len(panels)} pairs. " + "; ".join(titles[i] for i in shown[:6]),
        lambda: heat_panels(panels, Axis(x), Axis(y), "lift", (0.0, top), square=True),
    )


def plot_owners(pools: Sequence[PoolStats]) -> Plot | None:
    """Only of pools that several layers share."""
    have = [pool for pool in pools if pool.shared and pool.counts.any()]
    if not have:
        return None
    shown = [have[i] for i in pick(len(have))]
    widest = max(len(pool.owners) for pool in shown)
    panels = [
        Panel(f"layers {p.name}", p.shares, _ticks(p.owners), _ticks(p.layers)) for p in shown
    ]
    return Plot(
        "owners",
        "Whose experts a layer uses",
        "Share of the choices of each layer (rows, they add up to 1) that go to the experts each "
        "layer of the pool owns (columns). A bright diagonal: layers keep to their own experts; "
        f"{1 / widest:.0%} everywhere: they do not care." + left_out(len(have)),
        f"Matrices for {len(shown)} pools. "
        + "; ".join(f"layers {p.name}: own share {_own(p):.0%}" for p in shown[:6]),
        lambda: heat_panels(
            panels,
            Axis("layer that owns the expert"),
            Axis("layer that chooses"),
            "share of choices",
            (0.0, 1.0),
            square=True,
            numbers=".0%" if widest <= MOST_OWNERS else "",
        ),
    )


def _ticks(layers: Sequence[int]) -> dict[float, str]:
    return {float(i): str(layers[i]) for i in sparse_ticks(len(layers), 12)}


def _own(pool: PoolStats) -> float:
    return float(np.mean(list(pool.own_shares.values()))) if pool.own_shares else 0.0


def plot_imbalance(pools: Sequence[PoolStats]) -> Plot | None:
    """Where some pool serves several routers; their load as a whole is drawn nowhere else."""
    have = [pool for pool in pools if pool.counts.any()]
    if not any(pool.routers > 1 for pool in have):
        return None
    worst = max(have, key=lambda pool: float(pool.imbalance.max()))

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 3.0)
        ax = fig.subplots()
        at = np.arange(len(have))
        quartiles = [np.quantile(pool.imbalance, (0.25, 0.5, 0.75)) for pool in have]
        for place, pool, (low, middle, high) in zip(at, have, quartiles):
            spread = np.linspace(-0.22, 0.22, len(pool.imbalance))
            ax.bar(place, high - low, 0.6, bottom=low, color=PALETTE[4], alpha=0.35)
            ax.plot(place + spread, pool.imbalance, "o", ms=3.2, color=PALETTE[0], alpha=0.8)
            ax.hlines(middle, place - 0.3, place + 0.3, color=LIGHT.text, lw=1.4)
        ax.axhline(0.0, color=LIGHT.muted, lw=1, ls="--")
        shown = sparse_ticks(len(have), 16)
        ax.set_xticks(shown, [have[i].name for i in shown])
        ax.set_xlim(-0.6, len(have) - 0.4)
        ax.set_xlabel("layers that use the pool")
        ax.set_ylabel("(load - mean) / mean")
        ax.grid(axis="y")
        return fig

    return Plot(
        "pool_imbalance",
        "Load of the pools",
        "One dot per expert, in its own order: its load from all layers and rounds that use it, "
        "relative to the mean of the pool (0 = even, -1 = never chosen). Boxes: the middle half, "
        "with the median.",
        f"Strip plot of {len(have)} pools; the busiest expert of layers {worst.name} has "
        f"{worst.imbalance.max():+.2f}.",
        draw,
    )


def plot_similarity(similarity: Mapping[Place, Array], names: Mapping[Any, str]) -> Plot | None:
    """``similarity``: router -> cosine [E, E] between the answers of its experts."""
    have = [place for place, values in similarity.items() if len(values) > 1]
    if not have:
        return None
    shown = [have[i] for i in pick(len(have))]
    means = {place: off_diagonal_mean(similarity[place]) for place in shown}
    panels = [
        Panel(
            f"layer {names.get(place, str(place.layer))}: mean {means[place]:.2f}",
            similarity[place],
        )
        for place in shown
    ]
    return Plot(
        "expert_similarity",
        "Experts that answer alike",
        "Cosine between what two experts answer to the same held-out tokens, mean over tokens, "
        "before the gates. 1: they do the same, 0: unrelated." + left_out(len(have)),
        f"Matrices of cosines for {len(panels)} layers. "
        + "; ".join(panel.title for panel in panels[:6]),
        lambda: heat_panels(
            panels, Axis("expert"), Axis("expert"), "cosine", (-1.0, 1.0), square=True
        ),
    )
