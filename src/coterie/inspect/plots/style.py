"""Style of all plots: two colour themes, one sequential colour map, panels, rendering to PNG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from coterie.data.images.pictures import read_picture
from coterie.inspect.statistics.formulas import Array

CSS_PIXELS_PER_INCH = 96
DPI = 160
FULL_WIDTH = 9.6  # inches
MAX_PANELS = 12
MAX_NAME = 20  # signs of a name beside an axis
COLORMAP = "viridis"  # perceptually uniform, readable without colour vision
ALARM = "#d1242f"
# Okabe and Ito (2008): distinguishable with every common colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


@dataclass(frozen=True)
class Theme:
    name: str
    face: str
    text: str
    muted: str
    line: str
    empty: str


LIGHT = Theme("light", "#ffffff", "#1b2430", "#5b6775", "#d5dbe3", "#e9edf2")
DARK = Theme("dark", "#171d26", "#dfe5ec", "#9aa7b5", "#36404d", "#2a323d")


@dataclass(frozen=True, eq=False)
class Plot:
    """A picture to be: ``draw()`` makes the figure in the light theme; the rest is for readers."""

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """A rendered plot: PNG bytes for light and dark pages, width in CSS pixels."""

    plot: Plot
    light: bytes
    dark: bytes
    width: int


def render(plot: Plot) -> Picture:
    import matplotlib

    with matplotlib.rc_context(_settings(LIGHT)), warnings.catch_warnings():
        # A name in signs that no font here has is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = plot.draw()
        light = _png(figure)
        # The layout is found once and then frozen, as finding it is most of the work.
        figure.set_layout_engine("none")
        if box := _beyond(figure):
            light = _png(figure, box)
        recolor(figure, LIGHT, DARK)
        dark = _png(figure, box)
    inches = box.width if box else figure.get_figwidth()
    width = round(inches * CSS_PIXELS_PER_INCH)
    return Picture(plot=plot, light=light, dark=dark, width=width)


def _beyond(figure: Any) -> Any:
    """The box in inches that holds all of a drawn figure, where a text reaches over its edge."""
    from matplotlib.transforms import Bbox

    page = figure.bbox_inches
    box = Bbox.union([page, figure.get_tightbbox().padded(2 / DPI)])
    over = max(np.abs(box.get_points() - page.get_points()).ravel())
    return box if over > 4 / DPI else None


def _png(figure: Any, box: Any = None) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    if box is not None:
        buffer = io.BytesIO()
        canvas.print_figure(buffer, format="png", dpi=DPI, bbox_inches=box)
        pixels = read_picture(buffer.getvalue()).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
    canvas.draw()  # once; savefig would draw twice
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def recolor(figure: Any, old: Theme, new: Theme) -> None:
    """Replace every colour of one theme by its counterpart, in place; data colours stay."""
    from matplotlib.collections import Collection
    from matplotlib.colors import to_rgba
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    swap = {
        to_rgba(getattr(old, name)): getattr(new, name)
        for name in ("face", "text", "muted", "line", "empty")
    }
    names = {
        Text: ("color",),
        Line2D: ("color", "markeredgecolor", "markerfacecolor"),
        Patch: ("facecolor", "edgecolor"),
        Collection: ("edgecolor",),
    }
    for artist in figure.findobj():
        if isinstance(artist, AxesImage):
            _recolor_empty(artist, swap)
        for kind, fields in names.items():
            for field in fields if isinstance(artist, kind) else ():
                color = getattr(artist, f"get_{field}")()
                if kind is Collection:
                    color = tuple(color[0]) if len(color) else "none"
                if to_rgba(color) in swap:
                    getattr(artist, f"set_{field}")(swap[to_rgba(color)])


def _recolor_empty(image: Any, swap: dict[Any, str]) -> None:
    bad = tuple(image.cmap.get_bad())
    if bad in swap:
        image.set_cmap(image.cmap.with_extremes(bad=swap[bad]))


def _settings(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.face,
        "savefig.facecolor": theme.face,
        "axes.facecolor": theme.face,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": LIGHT.muted,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "text.color": theme.text,
        "xtick.color": LIGHT.muted,
        "ytick.color": LIGHT.muted,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "font.family": _fonts(),
        "text.parse_math": False,  # names of classes may hold dollar signs
    }


CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


@cache
def _fonts() -> list[str]:
    """The font of all pictures, and behind it what is there for signs that it has not."""
    from matplotlib.font_manager import get_font_names

    there = set(get_font_names())
    return ["DejaVu Sans", *(name for name in CJK if name in there)]


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def colormap(empty: str = LIGHT.empty) -> Any:
    import matplotlib

    return matplotlib.colormaps[COLORMAP].with_extremes(bad=empty)


def pick(count: int, most: int = MAX_PANELS) -> list[int]:
    """Indices shown of ``count`` things: all, or ``most`` evenly spaced with both ends."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]


def left_out(count: int, most: int = MAX_PANELS) -> str:
    """Sentence for a caption; empty if nothing was left out."""
    if count <= most:
        return ""
    return f" {most} of {count} layers are drawn, evenly spaced; the data file has all."


def depth_colors(count: int) -> list[Any]:
    """Few lines get the categorical palette, many a scale by depth (shallow to deep)."""
    import matplotlib

    if count <= 5:
        return list(PALETTE[:count])
    # The ends of the map vanish on a dark and on a light page.
    return list(matplotlib.colormaps[COLORMAP](np.linspace(0.12, 0.9, count)))


def expert_ticks(names: Sequence[str], ids: Sequence[int] = ()) -> dict[float, str] | None:
    """Ticks of experts that have names (all of them, or ``ids``), the ends of long names kept."""
    shown = [names[i] for i in ids] if ids and names else names
    short = [name if len(name) <= MAX_NAME else f"...{name[3 - MAX_NAME :]}" for name in shown]
    return {float(i): name for i, name in enumerate(short)} or None


def in_lines(title: str, most: int = 24) -> str:
    """A title of two names and a number, broken where it would reach into the next panel."""
    if len(title) <= most:
        return title
    return title.replace(" to ", "\nto ").replace(": ", ":\n" if " to " not in title else "\n")


def sparse_ticks(count: int, most: int) -> list[int]:
    """At most ``most`` round-stepped ticks over 0..count-1."""
    if count <= most:
        return list(range(count))
    raw = count / most
    step = next(
        factor * 10**power
        for power in range(9)
        for factor in (1, 2, 5)
        if factor * 10**power >= raw
    )
    return list(range(0, count, step))


@dataclass(frozen=True, eq=False)
class Panel:
    """One heat map: ``values`` [rows, columns], NaN = no data. ``x`` and ``y``: ticks of its own,
    in place of those of the axes."""

    title: str
    values: Array
    x: dict[float, str] | None = None
    y: dict[float, str] | None = None


@dataclass(frozen=True, eq=False)
class Axis:
    """Labels of the columns or rows of a heat map; ``ticks`` index -> text, None = numbers."""

    label: str
    ticks: dict[float, str] | None = None
    rotate: bool = False


def heat_panels(
    panels: Sequence[Panel],
    x: Axis,
    y: Axis,
    bar: str,
    limits: tuple[float, float] | None = None,
    square: bool = False,
    numbers: str = "",
) -> Any:
    """Small multiples with one colour scale; rows count downwards from 0. ``numbers``: the format
    in which every value is written into its cell, for small tables."""
    columns, fig = _grid(panels, x.rotate, square)
    axes = fig.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
    low, high = limits or (0.0, _top(panels))
    # Panels that are alike need labels at the edge only.
    same = len({(p.values.shape, *(p.y or {}).values()) for p in panels}) == 1
    same = same and not any(p.x for p in panels)
    image = None
    for index, ax in enumerate(axes.flat):
        if index >= len(panels):
            ax.set_visible(False)
            continue
        image = _heat_panel(ax, panels[index], (low, high), square)
        if numbers:
            _write_numbers(ax, panels[index].values, (low, high), numbers)
        below = index + columns >= len(panels)
        _label(ax, "x", x, panels[index].x, panels[index].values.shape[1], below)
        _label(ax, "y", y, panels[index].y, panels[index].values.shape[0], index % columns == 0)
        if same and not below:
            ax.set_xticklabels([])
        if same and index % columns:
            ax.set_yticklabels([])
    shrink = 0.9 if len(panels) <= columns else 0.6
    colorbar = fig.colorbar(image, ax=axes, shrink=shrink, aspect=22, pad=0.015)
    colorbar.set_label(bar, color=LIGHT.muted)
    colorbar.outline.set_visible(False)
    return fig


def _grid(panels: Sequence[Panel], rotate: bool, square: bool) -> tuple[int, Any]:
    """How many panels stand side by side, and a figure that has room for them."""
    columns = min(len(panels), 4)
    if rotate and columns == 4:  # long labels: wider panels, and no row with one panel alone
        columns = 2 if len(panels) == 4 else 3
    width = FULL_WIDTH if columns > 2 else 3.4 * columns + 1.4
    most_rows = max(panel.values.shape[0] for panel in panels)
    cell = (width - 1.2) / columns * (0.97 if columns == 4 else 0.8)  # four share their labels
    height = cell if square else float(np.clip(0.17 * most_rows, 0.9, 3.0))
    height += 0.17 * max(panel.title.count("\n") for panel in panels)
    lines = math.ceil(len(panels) / columns)
    return columns, figure(width, lines * (height + (0.85 if rotate else 0.55)) + 0.25)


def _heat_panel(ax: Any, panel: Panel, limits: tuple[float, float], square: bool) -> Any:
    image = ax.imshow(
        np.ma.masked_invalid(panel.values),
        cmap=colormap(),
        vmin=limits[0],
        vmax=limits[1],
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    ax.set_title(panel.title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def _write_numbers(ax: Any, values: Array, limits: tuple[float, float], form: str) -> None:
    middle = (limits[0] + limits[1]) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            # The map is dark where values are low. Near black and white: no colour of a theme.
            color = "#fefefe" if value < middle else "#101010"
            ax.text(column, row, format(value, form), color=color, ha="center", va="center",
                    fontsize=8)  # fmt: skip


def _top(panels: Sequence[Panel]) -> float:
    tops = [np.nanmax(p.values) for p in panels if np.isfinite(p.values).any()]
    return max([float(top) for top in tops if top > 0], default=1.0)


def _label(
    ax: Any, which: str, axis: Axis, own: dict[float, str] | None, count: int, name: bool
) -> None:
    ticks = axis.ticks if own is None else own
    if ticks is None:
        ticks = {float(i): str(i) for i in sparse_ticks(count, 12 if which == "x" else 16)}
    set_ticks = ax.set_xticks if which == "x" else ax.set_yticks
    options = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if axis.rotate else {}
    set_ticks(list(ticks), list(ticks.values()), **options)
    if name:
        (ax.set_xlabel if which == "x" else ax.set_ylabel)(axis.label)
