"""Restoration: from the degraded picture in ``cond.channels`` to the clean one, in one pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part
from coterie.train.objectives.base import OBJECTIVES


@OBJECTIVES.register
class RestorationConfig(Part):
    """Smooth L1 distance between the restored and the clean picture."""

    kind: Literal["restoration"] = "restoration"
    beta: PositiveFloat = 1.0
    """error at which smooth L1 turns from square to absolute, in [-1, 1] units"""

    def build(self, model: Any) -> Restoration:
        view = model.config.view
        if view != "x0":
            hint = "the network's answer is the clean picture"
            raise ConfigError(describe("model.view", view, "x0", hint))
        return Restoration(self)


class Restoration(nn.Module):
    """Smooth L1 distance between ``model(degraded)`` and the clean picture, plus balance losses."""

    def __init__(self, config: RestorationConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        prediction = restore(model, batch.cond, batch.ids, rng, progress)
        per_sample = self.error(prediction, batch.x)
        return Losses(
            main={"restoration": per_sample.mean()},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=per_sample.detach(),
        )

    def error(self, prediction: Prediction, clean: Tensor) -> Tensor:
        """f32 [B]."""
        value = prediction.value.float()
        loss = F.smooth_l1_loss(value, clean.float(), beta=self.config.beta, reduction="none")
        return loss.flatten(1).mean(1)


def restore(
    model: Any,
    cond: Condition,
    sample_ids: Tensor | None = None,
    rng: Generator | None = None,
    progress: float = 1.0,
) -> Prediction:
    """Ask a denoiser for the clean picture, taking the degraded one for its input without noise."""
    degraded = cond.channels
    if degraded is None:
        raise DataError(describe("cond.channels", None, "the degraded picture of each sample"))
    t = model.process.time_of_unit(torch.zeros(len(degraded), device=degraded.device))
    answer: Prediction = model(degraded, t, cond, sample_ids=sample_ids, rng=rng, progress=progress)
    return answer
