"""Point clouds: how generated sets of clouds compare with real ones, and how clouds look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coterie.inspect.plots.clouds import plot_clouds
from coterie.inspect.plots.style import render
from coterie.metrics import score_points
from coterie.runs.build import build_source
from coterie.runs.judges.base import batches, judges
from coterie.runs.judges.noise import NoiseJudge
from coterie.runs.sample.sampling import Samples, conditional

MOST = 128  # clouds in a set: a table of distances grows with the square


@judges("points")
class PointsJudge(NoiseJudge):
    """1-NNA, COV and MMD against held-out clouds of the same classes; floors are what clouds of the
    training set reach."""

    def scores(self, num: int) -> dict[str, Any]:
        source = build_source(self.run.config, "held_out")
        count = min(num, MOST, len(source), len(self.run.source))
        (reference,) = batches(source, count, count)
        (real,) = batches(self.run.source, count, count)
        asked = conditional(self.run) and reference.cond.label is not None
        labels = reference.cond.label.tolist() if asked else None  # type: ignore[union-attr]
        made = self.draw(count, labels=labels)
        return score_points(made.x, reference.x, real.x)

    def show(self, samples: Samples) -> np.ndarray:
        """Clouds f32 [n, P, 3]."""
        clouds: np.ndarray = samples.x.float().cpu().numpy()
        return clouds

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        """All clouds in one array, and a picture of the first ones."""
        super().write(samples, entries, folder)
        names = self.run.source.class_names
        picture = render(plot_clouds(self.show(samples), self.labels(samples), names))
        path = folder / "grid.png"
        path.write_bytes(picture.light)
        return path
