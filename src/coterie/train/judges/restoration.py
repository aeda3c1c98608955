"""Restoration: held-out degraded pictures are restored and compared with the clean ones."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.metrics.restoration import psnr, ssim
from coterie.train.judges.base import Judge, batches, judges
from coterie.train.judges.noise import ImageJudge
from coterie.train.objectives.restoration import restore
from coterie.train.run import build_source
from coterie.train.sampling import Samples, to_pixels

ROUNDS = 5  # timings of one picture, of which the median counts


@judges("restoration")
class RestorationJudge(ImageJudge):
    """PSNR and SSIM, over all and per kind of degradation, beside those of the degraded input."""

    steps = False
    unit, probe, held_out = Judge.unit, Judge.probe, Judge.held_out

    def _batch(self, num: int) -> Batch:
        source = build_source(self.run.config, "held_out")
        return batches(source, num, num)[0]

    @torch.no_grad()
    def _restored(self, batch: Batch) -> Tensor:
        value: Tensor = restore(self.run.model, batch.cond, batch.ids).value
        return value

    def scores(self, num: int) -> dict[str, Any]:
        """``floor`` is what the degraded picture itself scores."""
        batch = self._batch(num)
        out: dict[str, Any] = {}
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            ours = metric(self._restored(batch), batch.x).numpy()
            assert batch.cond.channels is not None
            given = metric(batch.cond.channels, batch.x).numpy()
            for kind, rows in self._kinds(batch).items():
                key = f"{name}/{kind}" if kind else name
                out[key] = {"value": float(ours[rows].mean()), "floor": float(given[rows].mean())}
        return {**out, "milliseconds": self._milliseconds(batch)}

    def _kinds(self, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of all pictures, and of each class."""
        rows = {"": np.ones(len(batch.ids), dtype=bool)}
        if batch.cond.label is not None:
            labels = batch.cond.label.numpy()
            rows |= {n: labels == i for i, n in enumerate(self.run.source.class_names)}
        return {kind: chosen for kind, chosen in rows.items() if chosen.any()}

    def _milliseconds(self, batch: Batch) -> float:
        """Of one picture alone, median."""
        one = batch.cond.index(torch.arange(1))
        times = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            with torch.no_grad():
                restore(self.run.model, one, batch.ids[:1])
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[1:])

    def draw(self, num: int, **options: Any) -> Samples:
        """Restored held-out pictures; nothing is random here."""
        batch = self._batch(num)
        label = batch.cond.label
        assert batch.cond.channels is not None
        labels = torch.full((len(batch.ids),), -1) if label is None else label
        side_by_side = torch.stack([batch.cond.channels, self._restored(batch), batch.x], dim=1)
        return Samples(side_by_side, labels, batch.ids.tolist())

    def labels(self, samples: Samples) -> list[int]:
        found: list[int] = samples.labels.tolist()
        return found

    def show(self, samples: Samples) -> np.ndarray:
        """Degraded, restored and clean, side by side: u8 [n, H, 3 W, C]."""
        return to_pixels(torch.cat(samples.x.unbind(1), dim=3))

    def columns(self, samples: Samples) -> int:
        return max(1, self.run.source.num_classes)
