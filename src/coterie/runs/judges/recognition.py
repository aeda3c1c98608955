"""Networks that read pictures: loss on held-out data at every noise level; they draw no samples."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.guides import Guide
from coterie.metrics import NoiseBins
from coterie.runs.build import build_source
from coterie.runs.judges.base import LEVELS, HeldOut, Judge, batches, judges, loss_bins, make_trace
from coterie.runs.judges.guide_scores import measured
from coterie.train.objectives.recognition import Recognition

LOOKED_AT = 512  # held-out pictures


@judges("recognition")
class RecognitionJudge(Judge):
    """Held-out loss is the objective's; of a guide at each of ``LEVELS`` noise levels."""

    draws = False

    def unit(self) -> str:
        task, config = self.run.model.task, self.run.config.objective
        kind = "mean squared error" if task == "map" else "cross-entropy, nats"
        if config.learn_from == "teacher" and task != "map":
            kind = "divergence from the teacher, nats"
        return f"{kind}, of {task}"

    @property
    def by_noise(self) -> bool:
        return isinstance(self.run.model, Guide)

    def at(self, batch: Batch, unit: float, rng: torch.Generator) -> Any:
        """The objective at one noise level."""
        assert isinstance(self.objective, Recognition)
        process = self.run.model.process
        t = process.time_of_unit(torch.full((len(batch.ids),), unit))
        eps = torch.randn(batch.x.shape, generator=rng)
        return self.objective.at(self.run.model, batch, t, eps)

    def probe(self, batch: Batch) -> tuple[float, tuple[Routing, ...]]:
        if not self.by_noise:
            return super().probe(batch)
        losses = self.at(batch, 0.5, generator(0, "probe"))
        return float(losses.per_sample.mean()), losses.routings

    @torch.no_grad()
    def held_out(self, limit: int = 512, size: int = 128) -> HeldOut:
        if not self.by_noise:
            return super().held_out(limit, size)
        source, trace = build_source(self.run.config, "held_out"), make_trace(self.run)
        bins = NoiseBins(LEVELS)
        for batch in batches(source, size, limit):
            for level in range(LEVELS):
                unit = (level + 0.5) / LEVELS
                rng = generator(0, "held_out", int(batch.ids[0]), level)
                losses = self.at(batch, unit, rng)
                bins.add(losses.per_sample, torch.full_like(losses.per_sample, unit))
                trace.add(losses.routings)
        rows = loss_bins(bins)
        return HeldOut(sum(row["loss"] for row in rows) / len(rows), rows, trace)

    def measures(self) -> dict[str, float]:
        model = self.run.model
        if isinstance(model, Guide):
            return measured(model, self.run.config.data.whole).flat()
        right = [self._right(batch) for batch in self._real()]
        return {"accuracy": sum(right) / len(right)} if model.task == "classes" else {}

    def _real(self) -> list[Batch]:
        return batches(build_source(self.run.config, "held_out"), 128, LOOKED_AT)

    @torch.no_grad()
    def _right(self, batch: Batch) -> float:
        seen = self.run.model(batch.x).value.argmax(1)
        return float((seen == batch.cond.label).float().mean())

    def details(self) -> dict[str, float]:
        model = self.run.model
        known = isinstance(model, Guide)
        return measured(model, self.run.config.data.whole).by_level() if known else {}

    def draw(self, num: int, **options: Any) -> NoReturn:
        allowed = "a run whose model answers samples"
        hint = "coterie sample DENOISER --guide this run"
        raise ConfigError(describe("RUN", str(self.run.path), allowed, hint))
