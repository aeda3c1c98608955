"""Evaluation of denoisers: loss per noise level, samples along the grid, distances to real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coterie.core.batch import Batch
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.data import Subset
from coterie.ensembles import coverage
from coterie.guides import Guide
from coterie.metrics import NoiseBins, evaluate_images
from coterie.metrics.evaluate import FEWEST
from coterie.runs.build import build_source
from coterie.runs.feature_networks import feature_network, read_labels, reference_rows
from coterie.runs.judges.base import (
    LEVELS,
    HeldOut,
    Judge,
    batches,
    by_class,
    judges,
    loss_bins,
    make_trace,
)
from coterie.runs.judges.class_shares import class_shares
from coterie.runs.judges.guide_scores import measured
from coterie.runs.sample.guides import followed
from coterie.runs.sample.sampling import Samples, conditional, grid_image, to_pixels

MIDDLE = 0.5  # noise level at which a denoiser is probed
REAL = 1000  # real pictures behind a distance


@judges("vector")
class NoiseJudge(Judge):
    """Anything that is denoised and has no better judge: losses only."""

    steps = True

    def unit(self) -> str:
        model = self.run.model
        return f"mean squared error, {getattr(model, 'view', None) or model.config.view}"

    def at(self, batch: Batch, unit: float, seed: torch.Generator) -> tuple[torch.Tensor, Any]:
        """(error per sample f32 [B], prediction) at one noise level in [0, 1]."""
        process = self.run.model.process
        t = process.time_of_unit(torch.full((len(batch.ids),), unit))
        eps = torch.randn(batch.x.shape, generator=seed)
        x_t = process.diffuse(batch.x, eps, t)
        # A guide is there for samples: the loss is that of the denoiser.
        cond = batch.cond if self.guide is None else Condition()
        prediction = self.run.model(x_t, t, cond, sample_ids=batch.ids)
        return self.objective.error(prediction, batch.x, eps, t), prediction

    def probe(self, batch: Batch) -> tuple[float, tuple[Routing, ...]]:
        error, prediction = self.at(batch, MIDDLE, generator(0, "probe"))
        return float(error.mean()), prediction.routings

    @torch.no_grad()
    def held_out(self, limit: int = 512, size: int = 128) -> HeldOut:
        """Every held-out sample at every one of ``LEVELS`` noise levels, with fixed noise.

        The noise depends on the batch (always the same ones) and the level only: two runs on the
        same data are compared on the same noisy inputs. The loss is conditional; where the model
        has a null condition, one batch is also traced without its labels.
        """
        source, trace = build_source(self.run.config, "held_out"), make_trace(self.run)
        bins = NoiseBins(LEVELS)
        errors: list[float] = []
        labels: list[int] = []
        for number, batch in enumerate(batches(source, size, limit)):
            first = int(batch.ids[0])
            for level in range(LEVELS):
                unit = (level + 0.5) / LEVELS
                error, prediction = self.at(batch, unit, generator(0, "held_out", first, level))
                bins.add(error, torch.full_like(error, unit))
                if batch.cond.label is not None:
                    errors.extend(error.tolist())
                    labels.extend(batch.cond.label.tolist())
                trace.add(prediction.routings)
                if number == 0 and conditional(self.run) and prediction.routings:
                    null = Batch(batch.x, batch.cond.as_null(len(batch.ids)), batch.ids)
                    again = self.at(null, unit, generator(0, "held_out", first, level))
                    trace.add(again[1].routings)
        rows = loss_bins(bins)
        classes = by_class(np.array(errors), labels, source.class_names)
        loss = float(np.mean([row["loss"] for row in rows]))
        return HeldOut(loss, rows, trace, class_losses=classes)

    @property
    def guide(self) -> Guide | None:
        """What the model's samples are guided by."""
        found = getattr(self.run.model, "guide", None)
        return found if isinstance(found, Guide) else None

    def measures(self) -> dict[str, float]:
        guide = self.guide
        return {} if guide is None else measured(guide, self.run.config.data.whole).flat()

    def details(self) -> dict[str, float]:
        guide = self.guide
        return {} if guide is None else measured(guide, self.run.config.data.whole).by_level()

    def show(self, samples: Samples) -> np.ndarray | None:
        x = samples.x
        return x.float().cpu().numpy() if x.dim() == 2 and x.shape[1] == 2 else None

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        path = folder / "samples.npy"
        np.save(path, samples.x.float().cpu().numpy(), allow_pickle=False)
        return path


def covered(source: Any, made: torch.Tensor) -> dict[str, Any]:
    """How far the samples' islands are from those of the data, in total variation, where the source
    knows the island of a sample; ``floor`` is what chance leaves."""
    placed = source.place(made) if hasattr(source, "place") else None
    if placed is None:
        return {}
    found = coverage(torch.from_numpy(placed), tuple(source.islands.prior))
    return {"island_distance": {"value": found.total_variation, "floor": found.expected}}


def _share(seen: torch.Tensor | None, wanted: torch.Tensor) -> float:
    assert seen is not None
    return float((seen == wanted).float().mean())


@judges("image")
class ImageJudge(NoiseJudge):
    """Frechet and kernel distance, precision and recall; floors are what real pictures reach."""

    def scores(self, num: int) -> dict[str, Any]:
        """Features of the network that suits the source."""
        run = self.run
        reference = Subset(run.source, reference_rows(len(run.source)))
        real, fresh = (
            torch.cat([batch.x for batch in batches(source, 250, REAL)])
            for source in (reference, build_source(run.config, "held_out"))
        )
        made = self.draw(num)
        scores: dict[str, Any] = {}
        if min(len(real), len(fresh), len(made.x)) >= FEWEST:
            scores = evaluate_images(feature_network(run.config.data.whole), made.x, real, fresh)
        else:
            few = min(len(real), len(fresh), len(made.x))
            scores["distances"] = f"not measured: {few} pictures, {FEWEST} or more are needed"
        scores |= covered(run.source, made.x) | class_shares(run, made.x) | followed(run, made.x)
        return scores | self._as_asked(made)

    def _as_asked(self, made: Samples) -> dict[str, Any]:
        """Share of samples in which a classifier of the data sees the class they were asked for;
        ``floor`` is what it sees in held-out pictures."""
        data = self.run.config.data.whole
        seen = read_labels(data, made.x) if conditional(self.run) else None
        if seen is None:
            return {}
        held_out = batches(build_source(self.run.config, "held_out"), 250, REAL)
        fresh = read_labels(data, torch.cat([batch.x for batch in held_out]))
        true = torch.cat([batch.cond.label for batch in held_out if batch.cond.label is not None])
        found = {"value": _share(seen, made.labels), "floor": _share(fresh, true)}
        return {"label_accuracy": found}

    def show(self, samples: Samples) -> np.ndarray:
        return to_pixels(samples.x)

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        """One PNG each, and all of them on a sheet."""
        pixels = self.show(samples)
        for entry, picture in zip(entries, pixels, strict=True):
            entry["file"] = f"{entry['index']:05d}.png"
            flat = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
            Image.fromarray(flat).save(folder / entry["file"])
        columns = min(self.columns(samples), 16)
        path = folder / "grid.png"
        grid_image(pixels, columns, scale=max(1, 64 // pixels.shape[2])).save(path)
        return path

    def columns(self, samples: Samples) -> int:
        """One per class where the samples have the classes in turn."""
        classes = self.run.source.num_classes
        turn = torch.arange(len(samples.labels)) % max(1, classes)
        in_turn = conditional(self.run) and torch.equal(samples.labels, turn)
        return classes if in_turn else 8
