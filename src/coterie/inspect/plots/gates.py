"""Maps of the experts' weights over single pictures, one per point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coterie.inspect.plots.style import FULL_WIDTH, LIGHT, PALETTE, Plot, figure, pick
from coterie.inspect.statistics.formulas import Array

MAX_POINTS = 10
GAP = 0.08


@dataclass(frozen=True, eq=False)
class GateMaps:
    """``inputs`` u8 [S, H, W, C]: what the model saw; ``notes`` of each; ``weights``: per point, by
    name and in running order, f64 [S, N, h, w] of the ``experts``, adding up to 1 over N."""

    inputs: np.ndarray
    notes: Sequence[str]
    weights: Mapping[str, Array]
    experts: Sequence[str]


def plot_gate_maps(maps: GateMaps | None) -> Plot | None:
    """One row per input; experts have a colour each, mixed by their weights."""
    if maps is None or not maps.weights or len(maps.experts) > len(PALETTE):
        return None
    names = list(maps.weights)
    shown = [names[i] for i in pick(len(names), MAX_POINTS)]
    caption = (
        "What the model saw (left), and whom it followed at each point, first layer to last: the "
        "colours of the experts, mixed by their weights. A picture of one colour follows one "
        "expert everywhere."
    )
    if len(shown) < len(names):
        caption += f" {len(shown)} of {len(names)} points are drawn."
    return Plot(
        "gate_maps",
        "Who decides where",
        caption,
        f"Maps of the weights of {len(maps.experts)} experts at {len(shown)} points for "
        f"{len(maps.inputs)} inputs.",
        lambda: _draw(maps, shown),
    )


def mixed(weights: Array) -> Array:
    """f64 [h, w, 3] in [0, 1]: the experts' colours by their weights [N, h, w]."""
    colours = np.array([_rgb(PALETTE[index]) for index in range(len(weights))])
    out: Array = np.clip(np.einsum("nhw,nc->hwc", weights, colours), 0.0, 1.0)
    return out


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))


def _draw(maps: GateMaps, shown: Sequence[str]) -> Any:
    from matplotlib.patches import Patch

    rows, columns = len(maps.inputs), len(shown) + 1
    height, width = maps.inputs.shape[1:3]
    ratio = height / width
    tile = min(1.1, (FULL_WIDTH - 1.2) / (columns * (1 + GAP)))
    fig = figure(columns * tile * (1 + GAP) + 1.2, rows * tile * (ratio + GAP) + 0.7)
    ax = fig.subplots()
    ax.set_axis_off()
    for row in range(rows):
        top = -row * (ratio + GAP)
        pictures = [_picture(maps.inputs[row]), *(mixed(maps.weights[n][row]) for n in shown)]
        for column, pixels in enumerate(pictures):
            left = column * (1 + GAP)
            box = (left, left + 1, top - ratio, top)
            ax.imshow(pixels, interpolation="nearest", extent=box)
        note = maps.notes[row]
        ax.text(-GAP, top - ratio / 2, note, ha="right", va="center", fontsize=8)
    for column, name in enumerate(("input", *shown)):
        ax.text(column * (1 + GAP) + 0.5, GAP, name, ha="center", va="bottom", fontsize=7)
    ax.set_xlim(-0.9, columns * (1 + GAP))
    ax.set_ylim(-rows * (ratio + GAP), 3 * GAP)
    handles = [Patch(color=PALETTE[i], label=name) for i, name in enumerate(maps.experts)]
    fig.legend(
        handles=handles, ncols=len(handles), loc="outside upper right", labelcolor=LIGHT.text
    )
    return fig


def _picture(pixels: np.ndarray) -> np.ndarray:
    """u8 [H, W, C] as red, green, blue."""
    return np.repeat(pixels[:, :, :1], 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
