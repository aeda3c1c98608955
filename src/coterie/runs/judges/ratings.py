"""Ratings: how well each task's answers rank held-out samples, over all and within each user."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coterie.core.batch import Batch
from coterie.inspect.plots.style import render
from coterie.inspect.plots.tasks import plot_tasks
from coterie.metrics import auc, gauc
from coterie.runs.build import build_source
from coterie.runs.judges.base import HeldOut, Judge, batches, judges
from coterie.runs.sample.sampling import Samples


class Answers(NamedTuple):
    """All held-out samples S: ``logits`` and ``targets`` f32 [S, T], ``users`` [S]."""

    logits: torch.Tensor
    targets: torch.Tensor
    users: np.ndarray


@judges("ratings")
class RatingsJudge(Judge):
    """GAUC and AUC per task over all held-out samples; a sample is what was held out, answered."""

    def unit(self) -> str:
        return "nats, sum of the tasks"

    @cached_property
    def _source(self) -> Any:
        return build_source(self.run.config, "held_out")

    @torch.no_grad()
    def _answer(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.run.model(batch.x, batch.cond, batch.ids).value
        return logits

    @cached_property
    def _answers(self) -> Answers:
        source = self._source
        whole = [source.get(rows) for rows in np.array_split(np.arange(len(source)), 8)]
        logits = torch.cat([self._answer(batch) for batch in whole if len(batch.ids)])
        targets = torch.cat([batch.targets for batch in whole if batch.targets is not None])
        return Answers(logits, targets, source.users)

    def held_out(self, limit: int = 512, size: int = 128) -> HeldOut:
        """The loss of each task beside their sum, over all held-out samples; routings of
        ``limit`` of them."""
        found, answers = super().held_out(limit, size), self._answers
        errors, known = self.objective.errors(answers.logits, answers.targets)
        means = (errors.sum(0) / known.sum(0).clamp_min(1)).tolist()
        total = float((self.objective.weights * errors).sum(1).mean())
        by_task = dict(zip(self._source.task_names, means))
        return HeldOut(total, found.bins, found.trace, by_task)

    def measures(self) -> dict[str, float]:
        """``gauc`` and ``auc``: means over the tasks; ``gauc/<task>``, ``auc/<task>``;
        ``dropped_users/<task>``: with one kind of answer only."""
        answers = self._answers
        out: dict[str, float] = {}
        for number, name in enumerate(self._source.task_names):
            known = torch.isfinite(answers.targets[:, number])
            scores, labels = answers.logits[known, number], answers.targets[known, number]
            ranked = gauc(scores, labels, answers.users[known.numpy()])
            out[f"gauc/{name}"], out[f"auc/{name}"] = ranked.value, auc(scores, labels)
            out[f"dropped_users/{name}"] = float(ranked.dropped)
        for metric in ("gauc", "auc"):
            values = [value for name, value in out.items() if name.startswith(f"{metric}/")]
            out[metric] = float(np.mean(values))
        return {name: value for name, value in out.items() if np.isfinite(value)}

    def draw(self, num: int, **options: Any) -> Samples:
        """Probabilities f32 [n, T] of held-out samples, always the same; nothing is random."""
        (batch,) = batches(self._source, num, num)
        ids = batch.ids
        return Samples(self._answer(batch).sigmoid(), torch.full_like(ids, -1), ids.tolist())

    def labels(self, samples: Samples) -> None:
        return None

    def show(self, samples: Samples) -> list[str]:
        """A line for each sample: who, what, the answer, and what each task said before."""
        names = self._source.task_names
        lines = []
        for index, row in zip(samples.seeds, samples.x.tolist()):
            said = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, row))
            lines.append(f"{self._source.tell(index)} ({said})")
        return lines

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        """``answers.csv``, one line per sample; ``tasks.png``: how well each task ranks."""
        names, truth = self._source.task_names, self._source.get(samples.seeds).targets
        with (folder / "answers.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", *names, *(f"true {name}" for name in names)])
            for entry, line, row, told in zip(entries, self.show(samples), samples.x, truth):
                entry["text"] = line
                writer.writerow([line, *(f"{v:.4f}" for v in row.tolist()), *told.tolist()])
        found = self.measures()
        rows = {name: (found.get(f"gauc/{name}"), found.get(f"auc/{name}")) for name in names}
        path = folder / "tasks.png"
        path.write_bytes(render(plot_tasks(rows)).light)
        return path
