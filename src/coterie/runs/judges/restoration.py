"""Restoration: held-out degraded pictures are restored and compared with the clean ones."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.routing import Routing
from coterie.metrics.calibration import router_calibration
from coterie.metrics.restoration import psnr, ssim
from coterie.runs.build import build_model, build_source
from coterie.runs.judges.base import Judge, batches, judges
from coterie.runs.judges.noise import ImageJudge
from coterie.runs.sample.sampling import Samples, to_pixels
from coterie.train.objectives.restoration import restore

SIZE = 100  # pictures restored at once
ROUNDS, TIMED = 25, 16  # timings of so many pictures at once, of which the median counts


@judges("restoration")
class RestorationJudge(ImageJudge):
    """PSNR and SSIM, over all and per kind of degradation, beside those of the degraded input;
    what a picture costs; what the router knows of the degradation."""

    steps = False
    unit, probe, held_out = Judge.unit, Judge.probe, Judge.held_out

    def _batch(self, num: int) -> Batch:
        source = build_source(self.run.config, "held_out")
        return batches(source, num, num)[0]

    @torch.no_grad()
    def _restored(self, batch: Batch) -> tuple[Tensor, list[list[Routing]]]:
        """Pictures, and the routings of every ``SIZE`` of them."""
        pictures, routings = [], []
        for rows in torch.arange(len(batch.ids)).split(SIZE):
            made = restore(self.run.model, batch.cond.index(rows), batch.ids[rows])
            pictures.append(made.value)
            routings.append([routing.detach() for routing in made.routings])
        return torch.cat(pictures), routings

    def scores(self, num: int) -> dict[str, Any]:
        """``floor`` is what the degraded picture itself scores."""
        batch = self._batch(num)
        restored, routings = self._restored(batch)
        out: dict[str, Any] = {}
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            ours = metric(restored, batch.x).numpy()
            assert batch.cond.channels is not None
            given = metric(batch.cond.channels, batch.x).numpy()
            for kind, rows in self._kinds(batch).items():
                key = f"{name}/{kind}" if kind else name
                out[key] = {
                    "value": float(ours[rows].mean()),
                    "floor": float(given[rows].mean()),
                    "floor_of": "the degraded pictures",
                }
        out["pictures"] = "degraded, restored, clean"
        return out | self._told(batch.cond.label, routings) | self._times(batch)

    def _kinds(self, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of all pictures, and of each class."""
        rows = {"": np.ones(len(batch.ids), dtype=bool)}
        if batch.cond.label is not None:
            labels = batch.cond.label.numpy()
            rows |= {n: labels == i for i, n in enumerate(self.run.source.class_names)}
        return {kind: chosen for kind, chosen in rows.items() if chosen.any()}

    def _told(self, labels: Tensor | None, parts: list[list[Routing]]) -> dict[str, float]:
        """How well routers tell degradations apart, mean over routers; {} without either."""
        if labels is None or len(labels) < 2 or not parts[0]:
            return {}
        found = [
            router_calibration(
                np.concatenate([use_of(part[place]) for part in parts]),
                labels.numpy(),
                self.run.source.num_classes,
            )
            for place in range(len(parts[0]))
        ]
        accuracy, error = np.mean(found, axis=0).tolist()
        return {"router_accuracy": accuracy, "router_calibration_error": error}

    def _times(self, batch: Batch) -> dict[str, float]:
        """Processor time per picture, restored ``TIMED`` at once, and its share of what the same
        network takes with dense feed-forward networks for experts. In turns, medians: what slows
        the machine down hits both."""
        rows = torch.arange(TIMED) % len(batch.ids)
        some, ids = batch.cond.index(rows), batch.ids[rows]
        config = self.run.config
        plain = config.model.replace(backbone=without_experts(config.model.backbone))
        models = [self.run.model, build_model(config.replace(model=plain)).eval()]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS + 2):
            for model, taken in zip(models, times, strict=True):
                began = time.process_time()
                with torch.no_grad():
                    restore(model, some, ids)
                taken.append(time.process_time() - began)
        ours, dense = (taken[2:] for taken in times)  # the first ones allocate
        share = statistics.median(one / other for one, other in zip(ours, dense, strict=True))
        return {"milliseconds": 1e3 * statistics.median(ours) / TIMED, "time_over_dense": share}

    def draw(self, num: int, **options: Any) -> Samples:
        """Restored held-out pictures; nothing is random here."""
        batch = self._batch(num)
        label = batch.cond.label
        assert batch.cond.channels is not None
        labels = torch.full((len(batch.ids),), -1) if label is None else label
        side_by_side = torch.stack([batch.cond.channels, self._restored(batch)[0], batch.x], dim=1)
        return Samples(side_by_side, labels, batch.ids.tolist())

    def labels(self, samples: Samples) -> list[int]:
        found: list[int] = samples.labels.tolist()
        return found

    def show(self, samples: Samples) -> np.ndarray:
        """Degraded, restored and clean, side by side: u8 [n, H, 3 W, C]."""
        return to_pixels(torch.cat(samples.x.unbind(1), dim=3))

    def columns(self, samples: Samples) -> int:
        return max(1, self.run.source.num_classes)


def without_experts(backbone: Any) -> Any:
    """The same configuration with nothing in its slots."""
    if hasattr(backbone, "trunk"):
        return backbone.replace(trunk=backbone.trunk.replace(slots=()))
    return backbone.replace(slots=())


def use_of(routing: Routing) -> np.ndarray:
    """f64 [B, E]: the weight that the tokens of each picture give to each expert, on average."""
    weights = torch.zeros(len(routing.ids), routing.num_experts + 1)
    weights.scatter_add_(1, routing.ids, routing.gates.float() * routing.valid)
    rows = weights[:, :-1].view(routing.batch[0], -1, routing.num_experts)
    return rows.mean(1).double().numpy()
