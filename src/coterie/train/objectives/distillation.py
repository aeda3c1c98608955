"""Distillation: one network is trained to predict what a trained model predicts.

Shapes: B batch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Generator, Tensor, nn

from coterie.core.batch import Batch, Losses
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part
from coterie.denoiser import MODELS
from coterie.process import TIMES, WEIGHTINGS, Transported, as_view, target_of
from coterie.train.objectives.base import OBJECTIVES
from coterie.train.objectives.denoising import drawn, mean_over


@OBJECTIVES.register
class DistillationConfig(Part):
    """Squared error between the predictions of a student and of a trained teacher."""

    kind: Literal["distillation"] = "distillation"
    teacher: Annotated[SerializeAsAny[Part], MODELS.validator] = "denoiser"  # type: ignore[assignment]
    """Any trained model. For an ensemble with the choice ``oracle``, the expert of the sample's
    cluster (``cond.task``), as in Decentralized Diffusion Models."""
    times: Annotated[SerializeAsAny[Part], TIMES.validator] = "uniform"  # type: ignore[assignment]
    """Distribution of the noise levels."""
    weighting: Annotated[SerializeAsAny[Part], WEIGHTINGS.validator] = "constant"  # type: ignore[assignment]
    """Weight of each noise level in the loss."""
    label_dropout: float = Field(0.1, ge=0, le=1)  # share of samples without condition, for both

    def build(self, model: Any) -> Distillation:
        return Distillation(self, model)


class Distillation(nn.Module):
    """MSE between the student's and the teacher's prediction, in the student's process and view."""

    def __init__(self, config: DistillationConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.process = model.process
        self.times = config.times.build(self.process)
        self.weighting = config.weighting.build(self.process)
        self.teacher: Any = config.teacher.build().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        """The teacher stays as it is."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        t, eps, cond = drawn(self.times, batch.x, batch.cond, self.config.label_dropout, rng)
        x_t = self.process.diffuse(batch.x, eps, t)
        prediction = model(x_t, t, cond, sample_ids=batch.ids, rng=rng, progress=progress)
        with torch.no_grad():
            told = self._asked(x_t, t, cond)
            target = as_view(self.process, told, prediction.view, x_t, t).value
        gap = (prediction.value.float() - target.float()).square()
        per_sample = mean_over(gap, prediction.visible)
        return Losses(
            main={"distillation": self.weighting.combine(per_sample, t, prediction.view)},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=per_sample.detach(),
            noise=self.process.unit_time(t),
        )

    def error(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Against the data, f32 [B]: what held-out losses compare students and teachers by."""
        target = target_of(self.process, x0, eps, prediction.view, t)
        return mean_over((prediction.value.float() - target.float()).square(), prediction.visible)

    def _asked(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        if self.teacher.process == self.process:
            answer: Prediction = self.teacher(x_t, t, cond)
            return answer
        return Transported(self.teacher, self.process)(x_t, t, cond)
