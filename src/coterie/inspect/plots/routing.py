"""Pictures of who is chosen: by noise level, class, position and sampling step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect import stats
from coterie.inspect.findings import FACETS, RouterStats
from coterie.inspect.plots.style import (
    FULL_WIDTH,
    LIGHT,
    PALETTE,
    Axis,
    Panel,
    Plot,
    colormap,
    figure,
    heat_panels,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.stats import Array
from coterie.inspect.tables import RouterTrace
from coterie.inspect.trace import Trace

MAX_CLASSES = 40
MAX_TILES = 16
MAX_POSITIONS = 64
FACET_COLORS = dict(zip(FACETS, PALETTE))
SHARE = "share of choices"


def plot_information(items: Sequence[RouterStats]) -> Plot | None:
    items = [item for item in items if item.information and item.num_experts > 1]
    if not items:
        return None

    def draw() -> Any:
        fig = figure(FULL_WIDTH, 3.1)
        ax = fig.subplots()
        facets = [f for f in FACETS if any(f in item.information for item in items)]
        width = 0.8 / len(facets)
        for offset, facet in enumerate(facets):
            at = np.arange(len(items)) + (offset - (len(facets) - 1) / 2) * width
            infos = [item.information.get(facet) for item in items]
            heights = [info.corrected if info else 0.0 for info in infos]
            floors = [info.floor if info else np.nan for info in infos]
            ax.bar(at, heights, width * 0.92, color=FACET_COLORS[facet], label=facet)
            ax.hlines(floors, at - width * 0.46, at + width * 0.46, color=LIGHT.text, lw=1.1)
        shown = sparse_ticks(len(items), 30)
        ax.set_xticks(shown, [items[i].name for i in shown])
        ax.set_xlabel("layer")
        ax.set_ylabel("information (bits)")
        ax.grid(axis="y")
        ax.plot([], [], color=LIGHT.text, lw=1.1, label="chance")
        ax.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1.0))
        return fig

    best = max(items, key=lambda item: max(info.bits for info in item.information.values()))
    facet, info = max(best.information.items(), key=lambda pair: pair[1].bits)
    return Plot(
        "information",
        "What the choice of expert tells",
        "Mutual information between the expert of a choice and the noise level, the class and the "
        "position of its row, one group per layer. 0 bits: the expert is chosen without regard to "
        "it. The short line is what unrelated variables give by chance: a bar below it is "
        "not evidence.",
        f"Bar chart over {len(items)} layers. Highest: {facet} in layer {best.name}, "
        f"{info.corrected:.2f} bits.",
        draw,
    )


def plot_noise(routers: Sequence[RouterTrace], names: Sequence[str]) -> Plot | None:
    tables = [r.noise.counts[r.main] for r in routers]
    panels = _share_panels(tables, [r.noise.rows[r.main] for r in routers], names)
    if not panels:
        return None
    bins = routers[0].noise_bins
    x = Axis("noise level t", {-0.5: "0", bins / 2 - 0.5: "0.5", bins - 0.5: "1"})
    return _heat_plot(
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
    kept = _telling_classes([routers[i] for i in have], columns)
    panels = []
    for i in have:
        router = routers[i]
        counts = np.zeros((columns + 1, router.num_experts))
        counts[: router.classes.columns] = router.classes.counts[0]
        counts[columns] = router.classes.counts[1].sum(0)
        panels.append(_share_panel(names[i], counts[[*kept, columns]]))
    labels = [class_names[c] if c < len(class_names) else str(c) for c in kept]
    ticks = {float(i): labels[i] for i in sparse_ticks(len(kept), 20)}
    rotate = any(len(text) > 2 for text in ticks.values())
    ticks[float(len(kept))] = "∅"
    caption = (
        "Share of the choices of each class that go to each expert; the last column, ∅, is "
        "unconditional. Columns that look alike mean that the class does not decide."
    )
    if len(kept) < columns:
        caption += f" {len(kept)} of {columns} classes: those that differ most from the mean."
    shown = pick(len(panels))
    return _heat_plot(
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
    panels = _share_panels(
        [step.counts for step in steps],
        [step.rows_seen for step in steps],
        [names.get(place, str(place.layer)) for place in places],
    )
    if not panels:
        return None
    return _heat_plot(
        "expert_by_step",
        "Experts along sampling",
        "Share of the choices of every sampling step that go to each expert, conditional and "
        "unconditional rows together. Step 0 is the noisiest.",
        panels,
        Axis("sampling step"),
        len(places),
    )


def plot_positions(
    routers: Sequence[RouterTrace], names: Sequence[str], grid: tuple[int, int] | None
) -> Plot | None:
    have = [i for i, r in enumerate(routers) if r.positions.rows[r.main].any()]
    if not have:
        return None
    fits = grid is not None and all(routers[i].positions.columns == grid[0] * grid[1] for i in have)
    if grid is not None and fits:
        return _maps([routers[i] for i in have], [names[i] for i in have], grid)
    counts = [_pool(routers[i].positions.counts[routers[i].main]) for i in have]
    panels = _share_panels(counts, [c.sum(1) for c in counts], [names[i] for i in have])
    longest = max(routers[i].positions.columns for i in have)
    size = counts[0].shape[0]
    x = Axis("position", {float(i): str(i * longest // size) for i in sparse_ticks(size, 6)})
    return _heat_plot(
        "expert_by_position",
        "Experts over positions",
        "Share of the choices at each position of the sequence that go to each expert. Vertical "
        "change means that experts specialise in positions.",
        panels,
        x,
        len(have),
    )


def _maps(routers: Sequence[RouterTrace], names: Sequence[str], grid: tuple[int, int]) -> Plot:
    shown = pick(len(routers))

    def draw() -> Any:
        rates = [_rates(routers[i], grid) for i in shown]
        tiles = max(len(ids) for ids, _ in rates)
        inch = min(0.82, (FULL_WIDTH - 1.4) / tiles)
        height = inch * grid[0] / grid[1] + 0.36
        fig = figure(min(FULL_WIDTH, 1.9 + inch * tiles), max(1.3, height * len(shown) + 0.3))
        axes = fig.subplots(len(shown), 1, squeeze=False)[:, 0]
        top = max(float(np.nanmax(values)) for _, values in rates) or 1.0
        image = None
        for ax, index, (ids, values) in zip(axes, shown, rates):
            image = _mosaic(ax, ids, values, tiles, top)
            ax.set_ylabel(f"layer {names[index]}", rotation=0, ha="right", va="center")
        bar = fig.colorbar(image, ax=axes, aspect=22, pad=0.015, shrink=min(1.0, 2.4 / len(shown)))
        bar.set_label("rate of choice", color=LIGHT.muted)
        bar.outline.set_visible(False)
        return fig

    caption = (
        "For every expert (numbered below its map) how often the token at each place of the image "
        "chooses it. A map of one colour: the expert works everywhere alike."
    )
    if max(r.num_experts for r in routers) > MAX_TILES:
        caption += f" The {MAX_TILES} busiest experts of a layer are drawn."
    return Plot(
        "expert_by_position",
        "Experts over the image",
        caption + left_out(len(routers)),
        f"Maps of {grid[0]} by {grid[1]} tokens per expert for {len(shown)} layers.",
        draw,
    )


def _rates(router: RouterTrace, grid: tuple[int, int]) -> tuple[list[int], Array]:
    """Experts shown, in their own order, and their rates [tiles, h, w]."""
    counts, rows = router.positions.counts[router.main], router.positions.rows[router.main]
    busiest = np.argsort(-counts.sum(0), kind="stable")[:MAX_TILES]
    ids = sorted(int(i) for i in busiest)
    return ids, stats.usage_rate(counts, rows)[:, ids].T.reshape(len(ids), *grid)


def _mosaic(ax: Any, ids: list[int], values: Array, tiles: int, top: float) -> Any:
    _, height, width = values.shape
    gap = max(1, math.ceil(width / 6))
    scale = 1 if width > 8 else 4  # gaps thinner than a token need finer pixels
    gap = gap if scale == 1 else 2
    canvas = np.full((height * scale, tiles * (width * scale + gap) - gap), np.nan)
    centres = []
    for tile, map_ in enumerate(values):
        start = tile * (width * scale + gap)
        canvas[:, start : start + width * scale] = map_.repeat(scale, 0).repeat(scale, 1)
        centres.append(start + width * scale / 2 - 0.5)
    cmap = colormap(LIGHT.face)
    image = ax.imshow(canvas, cmap=cmap, vmin=0, vmax=top, interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks(centres, [str(i) for i in ids])
    ax.set_yticks([])
    return image


def _pool(counts: Array, most: int = MAX_POSITIONS) -> Array:
    """Sum neighbouring positions [N, E] until at most ``most`` are left."""
    if len(counts) <= most:
        return counts
    edges = np.linspace(0, len(counts), most + 1).astype(int)[:-1]
    return np.add.reduceat(counts, edges, axis=0)


def _telling_classes(routers: Sequence[RouterTrace], columns: int) -> list[int]:
    """Classes that were seen; if too many, those whose load is farthest from the mean load."""
    far, seen = np.zeros(columns), np.zeros(columns)
    for router in routers:
        counts = router.classes.counts[0]
        seen[: len(counts)] += router.classes.rows[0]
        distance = np.abs(stats.load_share(counts) - stats.load_share(counts.sum(0))).sum(1)
        far[: len(counts)] += distance
    known = np.flatnonzero(seen)
    best = known[np.argsort(-far[known], kind="stable")[:MAX_CLASSES]]
    return sorted(int(i) for i in best)


def _share_panel(name: str, counts: Array) -> Panel:
    share = stats.load_share(counts)
    share[counts.sum(1) == 0] = np.nan
    return Panel(f"layer {name}", share.T)


def _share_panels(
    tables: Sequence[Array], rows: Sequence[Array], names: Sequence[str]
) -> list[Panel]:
    have = [i for i in range(len(tables)) if rows[i].any()]
    return [_share_panel(names[have[i]], tables[have[i]]) for i in pick(len(have))]


def _heat_plot(
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
    return f"{panel.title}: at most {peak:.0%} (expert {row}, column {column})"
