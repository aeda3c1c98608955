"""Plots of load balance: load, confidence, pairs of experts, stability, affinity, prototypes."""

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
    depth_colors,
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
from coterie.inspect.statistics.routers import RouterStats
from coterie.inspect.statistics.trace import Trace


def plot_load(items: Sequence[RouterStats], routers: Sequence[RouterTrace]) -> Plot | None:
    if not items:
        return None
    shown = pick(len(items))

    def draw() -> Any:
        columns = min(len(shown), 4)
        lines = math.ceil(len(shown) / columns)
        fig = figure(max(4.2, FULL_WIDTH * columns / 4), 1.75 * lines + 0.35)
        axes = fig.subplots(lines, columns, squeeze=False)
        for place, ax in enumerate(axes.flat):
            if place >= len(shown):
                ax.set_visible(False)
                continue
            _load_bars(ax, items[shown[place]], routers[shown[place]])
            if place % columns == 0:
                ax.set_ylabel("load (1 = uniform)")
            if place + columns >= len(shown):
                ax.set_xlabel("expert")
        return fig

    worst = max(items, key=lambda item: item.max_over_mean)
    labelled = any(router.has_labels for router in routers)
    rows = "conditional rows" if labelled else "the rows"
    caption = (
        f"Choices each expert receives from {rows}, relative to the uniform share (dashed line)."
    )
    if labelled:
        caption += " Open circles: unconditional rows, where there are any."
    caption += " A red cross marks a dead expert (load below 1 % of uniform)."
    return Plot(
        "load",
        "Load of the experts",
        caption + left_out(len(items)),
        f"Bar charts for {len(shown)} layers. Largest imbalance: layer {worst.name}, the busiest "
        f"expert has {worst.max_over_mean:.2f} times the mean load.",
        draw,
    )


def _load_bars(ax: Any, item: RouterStats, router: RouterTrace) -> None:
    ids = np.arange(item.num_experts)
    relative = item.load * item.num_experts
    ax.bar(ids, relative, 0.82, color=PALETTE[0])
    ax.axhline(1.0, color=LIGHT.muted, lw=1, ls="--")
    other = router.counts[1]
    if router.main == 0 and other.any():
        share = formulas.load_share(other) * item.num_experts
        ax.plot(ids, share, "o", mfc="none", mec=PALETTE[1], ms=4.5, mew=1.2)
    if item.enough and item.dead:
        dead = list(item.dead)
        level = max(1.0, float(relative.max())) * 0.07
        ax.plot(dead, [level] * len(dead), "x", color=ALARM, ms=6.5, mew=2)
    if named := expert_ticks(item.expert_names):
        ax.set_xticks(list(named), list(named.values()), rotation=30, ha="right")
    else:
        ax.set_xticks(sparse_ticks(item.num_experts, 10))
    ax.set_ylim(bottom=0)
    ax.set_title(f"layer {item.name}")


def plot_noise_curves(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    have = [i for i, r in enumerate(routers) if r.noise.varies and r.num_experts > 1]
    if not have:
        return None

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        left, right = fig.subplots(1, 2)
        for color, i in zip(depth_colors(len(have)), have):
            router = routers[i]
            centres = (np.arange(router.noise_bins) + 0.5) / router.noise_bins
            half = router.main
            entropy = formulas.confidence_entropy(
                router.entropy[half], router.entropy_rows[half], router.num_experts
            )
            left.plot(centres, entropy, "o-", ms=3.5, color=color, label=names[i])
            spread = [formulas.load_cv(c) if c.any() else np.nan for c in router.noise.counts[half]]
            right.plot(centres, spread, "o-", ms=3.5, color=color, label=names[i])
        left.set_title("How undecided the router is")
        left.set_ylabel("entropy of a row / log E")
        left.set_ylim(0, 1.02)
        right.set_title("How uneven the load is")
        right.set_ylabel("coefficient of variation")
        right.set_ylim(bottom=0)
        for ax in (left, right):
            ax.set_xlabel("noise level t (0 = data, 1 = noise)")
            ax.set_xlim(0, 1)
            ax.grid(axis="y")
        _depth_legend(fig, right, names, have)
        return fig

    return Plot(
        "balance_over_noise",
        "Certainty and balance over noise levels",
        "Left: mean entropy of a row's router probabilities; 0 is certain, 1 undecided. Right: "
        "coefficient of variation of the load inside each noise bin; 0 is even, and it is high "
        "where experts specialise in noise levels. One line per layer.",
        f"Two line charts over noise levels, one line for each of {len(have)} layers.",
        draw,
    )


def _depth_legend(fig: Any, ax: Any, names: Sequence[str], have: Sequence[int]) -> None:
    handles, labels = ax.get_legend_handles_labels()
    shown = pick(len(have), 8)
    fig.legend(
        [handles[i] for i in shown],
        [f"layer {labels[i]}" for i in shown],
        loc="outside right center",
    )


def plot_choices(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    """Only where the number of choices varies between rows."""
    have = [i for i, r in enumerate(routers) if np.count_nonzero(r.choices[r.main]) > 1]
    if not have:
        return None
    shares = [formulas.choice_histogram(routers[i].choices[routers[i].main]) for i in have]
    wide = max(len(share) for share in shares)
    panel = np.array([np.pad(share, (0, wide - len(share))) for share in shares])
    ticks = {float(row): names[i] for row, i in enumerate(have)}
    return Plot(
        "choices",
        "Choices per row",
        "Share of rows that use 0, 1, 2, ... experts, one line per layer.",
        f"Heat map of the number of choices per row in {len(have)} layers.",
        lambda: heat_panels(
            [Panel("", panel)],
            Axis("experts used by a row"),
            Axis("layer", ticks),
            "share of rows",
        ),
    )


def plot_pairs(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    have = [i for i, r in enumerate(routers) if r.num_experts > 2 and _off_diagonal(r).any()]
    if not have:
        return None
    shown = [have[i] for i in pick(len(have))]
    lifts = [formulas.coactivation_lift(routers[i].pairs[routers[i].main]) for i in shown]
    ticks = [expert_ticks(routers[i].expert_names) for i in shown]
    titles = [f"layer {names[i]}" for i in shown]
    panels = [Panel(name, lift, one, one) for name, lift, one in zip(titles, lifts, ticks)]
    finite = np.concatenate([lift[np.isfinite(lift)] for lift in lifts])
    top = max(2.0, float(np.quantile(finite, 0.99))) if finite.size else 2.0
    return Plot(
        "coactivation",
        "Experts that work together",
        "How much more often two experts serve the same row than their loads explain: 1 is "
        "chance, 0 never, 2 twice as often. Grey: undefined." + left_out(len(have)),
        f"Matrices of co-activation for {len(shown)} layers.",
        lambda: heat_panels(
            panels,
            Axis("expert", rotate=any(ticks)),
            Axis("expert"),
            "lift",
            (0.0, top),
            square=True,
        ),
    )


def _off_diagonal(router: RouterTrace) -> Array:
    pairs = router.pairs[router.main].copy()
    np.fill_diagonal(pairs, 0)
    return pairs


def plot_consistency(trace: Trace, names: dict[Any, str]) -> Plot | None:
    curves = {place: step.mean_overlap() for place, step in trace.steps.items()}
    curves = {place: curve for place, curve in curves.items() if np.isfinite(curve).any()}
    if not curves:
        return None
    chances = [
        formulas.chance_overlap(
            trace.steps[place].counts.sum(0), trace.steps[place].rows_seen.sum()
        )
        for place in curves
    ]

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 2.9)
        ax = fig.subplots()
        colors = depth_colors(len(curves))
        for color, (place, curve) in zip(colors, curves.items()):
            label = names.get(place, str(place.layer))
            ax.plot(np.arange(len(curve)), curve, "o-", ms=3.5, color=color, label=label)
        ax.axhline(float(np.mean(chances)), color=LIGHT.muted, lw=1, ls="--")
        ax.set_ylim(0, 1.03)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("sampling step (0 = noisiest)")
        ax.set_ylabel("overlap with the step before")
        ax.grid(axis="y")
        _depth_legend(fig, ax, list(names.values()), list(range(len(curves))))
        return fig

    mean = np.mean([np.nanmean(curve) for curve in curves.values()])
    return Plot(
        "step_consistency",
        "How steady choices are along sampling",
        "Share of the experts of a token that it also chose one sampling step earlier. 1: never "
        "changes, so experts can stay in fast memory. Dashed: what independent choices with the "
        "same loads would give (mean over layers).",
        f"Line chart for {len(curves)} layers; mean overlap {mean:.0%}, chance "
        f"{np.mean(chances):.0%}.",
        draw,
    )


def plot_affinity(routers: Sequence[RouterTrace]) -> Plot | None:
    """Overlap of the experts two noise levels use, over all routers."""
    usage, source = noise_usage(routers)
    if usage is None:
        return None
    matrix = formulas.task_affinity(usage)
    size = len(matrix)
    ticks = {-0.5: "0", size / 2 - 0.5: "0.5", size - 0.5: "1"}
    return Plot(
        "task_affinity",
        "Which noise levels share experts",
        f"Overlap of the experts that two noise levels use, over all layers ({source}). 1: the "
        "same experts equally often, 0: none in common. Blocks are groups of noise levels that "
        "are treated alike.",
        f"Matrix of {size} by {size} noise levels; lowest overlap {np.nanmin(matrix):.2f}.",
        lambda: heat_panels(
            [Panel("", matrix)],
            Axis("noise level t", ticks),
            Axis("noise level t", ticks),
            "overlap",
            (0.0, 1.0),
            square=True,
        ),
    )


def noise_usage(routers: Sequence[RouterTrace]) -> tuple[Array | None, str]:
    """[T, U] use of all experts per noise level, and where it comes from.

    The routers' own tables over all steps if they have them (U: their experts), else noise bins.
    """
    tabled = [r for r in routers if r.table is not None]
    if tabled:
        length = min(len(r.table) for r in tabled if r.table is not None)
        parts = [
            formulas.top_k_usage(r.table[:length], r.top_k) for r in tabled if r.table is not None
        ]
        return np.concatenate(parts, axis=1), "from the routers' tables over all steps"
    binned = [r for r in routers if np.count_nonzero(r.noise.rows[r.main]) > 1]
    if not binned:
        return None, ""
    rates = [formulas.usage_rate(r.noise.counts[r.main], r.noise.rows[r.main]) for r in binned]
    return np.concatenate(rates, axis=1), f"in {binned[0].noise_bins} noise bins"


def plot_prototypes(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    have = [i for i, r in enumerate(routers) if r.prototypes is not None]
    if not have:
        return None
    shown = [have[i] for i in pick(len(have))]
    known = [(names[i], routers[i].prototypes) for i in shown]
    panels = [Panel(f"layer {n}", formulas.cosine_matrix(p)) for n, p in known if p is not None]
    return Plot(
        "prototypes",
        "Similarity of the prototypes",
        "Cosine between the prototypes of a router. Bright off the diagonal: two experts are asked "
        "for the same thing." + left_out(len(have)),
        f"Matrices of cosines for {len(shown)} layers.",
        lambda: heat_panels(
            panels, Axis("expert"), Axis("expert"), "cosine", (-1.0, 1.0), square=True
        ),
    )
