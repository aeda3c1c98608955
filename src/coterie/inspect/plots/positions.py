"""Plots of expert use by position: maps over an image or volume, or curves over a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect.plots.routing import heat_plot, share_panels
from coterie.inspect.plots.style import (
    FULL_WIDTH,
    LIGHT,
    Axis,
    Plot,
    colormap,
    expert_ticks,
    figure,
    left_out,
    pick,
    sparse_ticks,
)
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import RouterTrace
from coterie.inspect.statistics.formulas import Array

MAX_TILES = 16
MAX_POSITIONS = 64


def plot_positions(
    routers: Sequence[RouterTrace], names: Sequence[str], grid: tuple[int, ...] | None
) -> Plot | None:
    have = [i for i, r in enumerate(routers) if r.positions.rows[r.main].any()]
    if not have:
        return None
    grids = [routers[i].grid or grid for i in have]
    known = [one for one in grids if one is not None]
    if all(one and routers[i].positions.columns == math.prod(one) for i, one in zip(have, grids)):
        return _maps([routers[i] for i in have], [names[i] for i in have], known)
    counts = [_pool(routers[i].shares(routers[i].positions)[routers[i].main]) for i in have]
    named = [routers[i].expert_names for i in have]
    sums = [c.sum(1) for c in counts]
    panels = share_panels(counts, sums, [names[i] for i in have], named)
    longest = max(routers[i].positions.columns for i in have)
    size = counts[0].shape[0]
    x = Axis("position", {float(i): str(i * longest // size) for i in sparse_ticks(size, 6)})
    return heat_plot(
        "expert_by_position",
        "Experts over positions",
        "Share of the choices at each position of the sequence that go to each expert. Vertical "
        "change means that experts specialise in positions.",
        panels,
        x,
        len(have),
    )


def face(values: Array, grid: tuple[int, ...]) -> Array:
    """Values [..., N] of tokens on a grid as a map [..., height, width]: an image as it is, a
    volume (x to the side, y upwards, z to the front) from the front, mean over its depth."""
    placed = values.reshape(*values.shape[:-1], *grid)
    if len(grid) == 2:
        return placed
    known = np.isfinite(placed)
    total = np.where(known, placed, 0).sum(-1)
    mean = np.divide(total, known.sum(-1), out=np.full(total.shape, np.nan), where=known.any(-1))
    return np.swapaxes(mean, -1, -2)[..., ::-1, :]


def scene(grid: tuple[int, ...]) -> tuple[str, str]:
    """What the tokens show, and what a caption adds on how it is seen."""
    flat = len(grid) == 2
    return ("image", "") if flat else ("volume", " (seen from the front, mean over its depth)")


def _maps(
    routers: Sequence[RouterTrace], names: Sequence[str], grids: Sequence[tuple[int, ...]]
) -> Plot:
    shown = pick(len(routers))
    grid = max(grids, key=math.prod)
    tall, wide = grid if len(grid) == 2 else (grid[1], grid[0])
    what, view = scene(grid)
    soft = all(router.soft for router in routers)

    def draw() -> Any:
        rates = [_rates(routers[i], grids[i]) for i in shown]
        tiles = max(len(ids) for ids, _ in rates)
        inch = min(0.82, (FULL_WIDTH - 1.4) / tiles)
        height = inch * tall / wide + 0.36
        longest = max(len(names[i]) for i in shown)
        side = 1.6 + max(0.3, 0.08 * longest)  # of names and bar
        fig = figure(min(FULL_WIDTH, side + inch * tiles), max(1.3, height * len(shown) + 0.3))
        axes = fig.subplots(len(shown), 1, squeeze=False)[:, 0]
        top = max(float(np.nanmax(values)) for _, values in rates) or 1.0
        image = None
        for ax, index, (ids, values) in zip(axes, shown, rates):
            image = _mosaic(ax, ids, values, tiles, top)
            if named := expert_ticks(routers[index].expert_names, ids):
                ax.set_xticklabels(list(named.values()))
            ax.set_ylabel(f"layer {names[index]}", rotation=0, ha="right", va="center")
        bar = fig.colorbar(image, ax=axes, aspect=22, pad=0.015, shrink=min(1.0, 2.4 / len(shown)))
        bar.set_label("mean weight" if soft else "rate of choice", color=LIGHT.muted)
        bar.outline.set_visible(False)
        return fig

    caption = (
        f"For every expert (numbered below its map) how often the token at each place of the {what}"
        f"{view} chooses it. A map of one colour: the expert works everywhere alike."
    )
    if soft:
        caption = (
            "For every expert (numbered below its map) its mean weight at each place of the "
            f"{what}{view}. A map of one colour: the expert counts everywhere alike."
        )
    if max(r.num_experts for r in routers) > MAX_TILES:
        caption += f" The {MAX_TILES} busiest experts of a layer are drawn."
    return Plot(
        "expert_by_position",
        f"Experts over the {what}",
        caption + left_out(len(routers)),
        f"Maps of {tall} by {wide} tokens per expert for {len(shown)} layers.",
        draw,
    )


def _rates(router: RouterTrace, grid: tuple[int, ...]) -> tuple[list[int], Array]:
    """Experts shown, in their own order, and their rates [tiles, h, w]."""
    counts = router.shares(router.positions)[router.main]
    rows = router.positions.rows[router.main]
    busiest = np.argsort(-counts.sum(0), kind="stable")[:MAX_TILES]
    ids = sorted(int(i) for i in busiest)
    return ids, face(formulas.usage_rate(counts, rows)[:, ids].T, grid)


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
