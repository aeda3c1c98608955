"""Classification: trains the small feature networks that metrics use."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator
from torch.nn import functional as F

from coterie.core.batch import Batch, Losses
from coterie.core.errors import DataError, describe
from coterie.core.registry import Part
from coterie.train.objectives.base import OBJECTIVES


@OBJECTIVES.register
class ClassificationConfig(Part):
    """Cross entropy of the class."""

    kind: Literal["classification"] = "classification"

    def build(self, model: Any) -> Classification:
        return Classification()


class Classification:
    """Cross entropy of ``model(x) -> logits [B, classes]`` against ``cond.label``."""

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        label = batch.cond.label
        if label is None:
            raise DataError(describe("cond.label", None, "a class per sample"))
        logits = model(batch.x)
        loss = F.cross_entropy(logits.float(), label, reduction="none")
        accuracy = (logits.argmax(1) == label).float().mean()
        return Losses(
            main={"classification": loss.mean()},
            per_sample=loss.detach(),
            extras={"accuracy": torch.as_tensor(accuracy).detach()},
        )
