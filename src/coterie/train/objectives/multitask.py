"""Several yes-or-no tasks at once: the sum of their binary cross entropies."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, DataError, describe, unknown
from coterie.core.registry import Part
from coterie.core.share import over_batch
from coterie.data.ratings.rating_rows import check_answers
from coterie.train.objectives.base import OBJECTIVES


@OBJECTIVES.register
class MultiTaskObjectiveConfig(Part):
    """Sum of the binary cross entropies of several tasks."""

    kind: Literal["multitask"] = "multitask"
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """weight of a task's loss, by name; default 1"""

    def build(self, model: Any) -> MultiTaskObjective:
        tasks: tuple[str, ...] = getattr(model.config.backbone, "tasks", ())
        if not tasks:
            hint = "its answer has no tasks"
            raise ConfigError(
                describe("model.backbone", model.config.backbone.kind, "multitask", hint)
            )
        for name in self.weights:
            if name not in tasks:
                raise ConfigError(unknown("objective.weights", name, tasks))
        return MultiTaskObjective(self, tasks)


class MultiTaskObjective(nn.Module):
    """``sum_t w_t BCE_t``, each the mean over samples with a label for that task; plus balance
    losses."""

    weights: Tensor

    def __init__(self, config: MultiTaskObjectiveConfig, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        weights = torch.tensor([config.weights.get(name, 1.0) for name in tasks])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        prediction = model(batch.x, batch.cond, batch.ids, rng, progress)
        errors, known = self.errors(prediction.value, batch.targets)
        means = self.weights * over_batch(errors.sum(0), known.sum(0))
        return Losses(
            main=dict(zip(self.tasks, means.unbind())),
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=(self.weights * errors.detach()).sum(1),
        )

    def errors(self, logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """(binary cross entropy f32 [B, T], 0 for missing labels; bool [B, T], whether there is a
        label)."""
        if targets is None or targets.shape != logits.shape:
            found = None if targets is None else tuple(targets.shape)
            raise DataError(
                describe("targets", found, f"an answer per task, {tuple(logits.shape)}")
            )
        check_answers(targets, self.tasks, "targets")
        known = ~torch.isnan(targets)
        truth = torch.where(known, targets, 0.0)
        errors = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
        return errors * known, known
