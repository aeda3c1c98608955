"""Evaluation of routers of ensembles: accuracy and calibration of the predicted cluster."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from coterie.core.batch import Source
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import generator
from coterie.metrics.calibration import calibration_error
from coterie.runs.build import build_source
from coterie.runs.judges.base import LEVELS, Judge, batches, judges

SAMPLES = 512


@judges("posterior")
class PosteriorJudge(Judge):
    """Held-out loss is the cross-entropy in nats; a router answers no samples."""

    draws = False

    def unit(self) -> str:
        return "cross-entropy of the cluster, nats"

    @property
    def by_noise(self) -> bool:
        return True

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Share of right clusters and calibration error over all noise levels, and the share of
        right ones at the cleanest and the noisiest tenth."""
        probs, clusters = self._posteriors(build_source(self.run.config, "held_out"))
        right = probs.argmax(2) == clusters
        flat, wanted = probs.reshape(-1, probs.shape[2]), np.tile(clusters, LEVELS)
        return {
            "cluster_accuracy": float(right.mean()),
            "cluster_accuracy_clean": float(right[0].mean()),
            "cluster_accuracy_noisy": float(right[-1].mean()),
            "calibration_error": calibration_error(flat, wanted),
        }

    def _posteriors(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [levels, S, K], clusters [S]) under noise that depends on the batch."""
        process, levels = self.run.model.process, []
        seen = batches(source, 128, SAMPLES)
        clusters = [self.objective.split(batch.cond)[0].numpy() for batch in seen]
        for level in range(LEVELS):
            rows = []
            for batch in seen:
                t = process.time_of_unit(torch.full((len(batch.ids),), (level + 0.5) / LEVELS))
                noise = generator(0, "held_out", int(batch.ids[0]), level)
                x_t = process.diffuse(batch.x, torch.randn(batch.x.shape, generator=noise), t)
                cond = self.objective.split(batch.cond)[1]
                rows.append(self.run.model(x_t, t, cond).value.softmax(1).numpy())
            levels.append(np.concatenate(rows))
        return np.stack(levels), np.concatenate(clusters)

    def draw(self, num: int, **options: Any) -> NoReturn:
        allowed = "a run whose model answers samples"
        raise ConfigError(describe("RUN", str(self.run.path), allowed, "this one routes them"))
