"""Episodes in the plane as pictures: one tile for each, or all of them moving at once.

Legend: E episodes, S steps, P pixels a side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coterie.data.actions.chunks import Scene
from coterie.inspect.plots.style import ALARM, LIGHT, PALETTE
from coterie.inspect.statistics.formulas import Array

SMOOTH = 3  # pixels are drawn this much finer and then averaged
OBSTACLE, DONE, GOING = "#9aa7b5", "#009E73", PALETTE[0]
MOST_MOVING = 60


class Canvas:
    """A square view of a scene, y upwards."""

    def __init__(self, scene: Scene, size: int) -> None:
        from PIL import Image, ImageDraw

        self.scene, self.size = scene, size
        self._fine = size * SMOOTH
        low, high = np.asarray(scene.low), np.asarray(scene.high)
        self._middle, self._span = (low + high) / 2, 1.08 * float((high - low).max())
        self.image = Image.new("RGB", (self._fine, self._fine), LIGHT.face)
        self._pen = ImageDraw.Draw(self.image)
        for x, y, radius in scene.discs:
            self.disc((x, y), radius, OBSTACLE)

    def at(self, places: Array) -> Array:
        """Pixels [..., 2] of places [..., 2]."""
        unit = (np.asarray(places, dtype=np.float64) - self._middle) / self._span
        return (np.array([0.5, 0.5]) + unit * np.array([1, -1])) * self._fine

    def disc(self, place: tuple[float, float], radius: float, colour: str, ring: int = 0) -> None:
        x, y = self.at(np.array(place))
        r = max(radius / self._span * self._fine, SMOOTH)
        box = (x - r, y - r, x + r, y + r)
        if ring:
            self._pen.ellipse(box, outline=colour, width=ring * SMOOTH)
        else:
            self._pen.ellipse(box, fill=colour)

    def line(self, places: Array, colour: str, width: int = 2) -> None:
        points = [tuple(point) for point in self.at(places)]
        if len(points) > 1:
            self._pen.line(points, fill=colour, width=width * SMOOTH, joint="curve")

    def pixels(self) -> Array:
        """u8 [P, P, 3]."""
        from PIL import Image

        return np.asarray(self.image.resize((self.size, self.size), Image.Resampling.BOX))


def draw_paths(
    paths: Array, targets: Array, success: Array, steps: Array, scene: Scene, size: int = 160
) -> Array:
    """One picture per episode, u8 [E, P, P, 3]: obstacles grey, the target a ring, the path green
    where it ends well and red where it does not."""
    pictures = []
    for path, target, well, count in zip(paths, targets, success, steps, strict=True):
        canvas = Canvas(scene, size)
        canvas.disc(tuple(target), scene.reach, LIGHT.text, ring=1)
        colour = DONE if well else ALARM
        canvas.line(path[: count + 1], colour)
        canvas.disc(tuple(path[0]), 0.02, LIGHT.text)
        canvas.disc(tuple(path[count]), 0.035, colour)
        pictures.append(canvas.pixels())
    return np.stack(pictures)


def animate_paths(
    paths: Array, targets: Array, success: Array, steps: Array, scene: Scene, out: Path
) -> None:
    """Write a GIF of the first episodes together, a frame for every second step, the last one
    shown for long."""
    from PIL import Image

    count = min(len(paths), MOST_MOVING)
    last = int(steps[:count].max())
    frames = []
    for now in [*range(0, last, 2), last]:
        canvas = Canvas(scene, 320)
        for target in np.unique(targets[:count], axis=0):
            canvas.disc(tuple(target), scene.reach, LIGHT.text, ring=1)
        for path, well, end in zip(paths, success, steps[:count], strict=False):
            over = now >= end
            colour = (DONE if well else ALARM) if over else GOING
            canvas.line(path[: min(now, end) + 1], colour, width=1)
            canvas.disc(tuple(path[min(now, end)]), 0.025, colour)
        frames.append(Image.fromarray(canvas.pixels()).quantize(64))
    waits = [60] * (len(frames) - 1) + [2500]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=waits, loop=0)
