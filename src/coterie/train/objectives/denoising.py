"""Denoising: add noise, predict, and compare in the network's view.

Shapes: B batch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny
from torch import Generator, Tensor, nn

from coterie.core.batch import Batch, Losses
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part
from coterie.core.share import normal, own, uniform, whole
from coterie.process import TIMES, WEIGHTINGS, Process, Times, convert, target_of, vlb_bits
from coterie.train.objectives.base import OBJECTIVES


@OBJECTIVES.register
class DenoisingConfig(Part):
    """The loss of diffusion models: squared error of the prediction, weighted by noise level."""

    kind: Literal["denoising"] = "denoising"
    times: Annotated[SerializeAsAny[Part], TIMES.validator] = "uniform"  # type: ignore[assignment]
    """Distribution of the noise levels."""
    weighting: Annotated[SerializeAsAny[Part], WEIGHTINGS.validator] = "constant"  # type: ignore[assignment]
    """Weight of each noise level in the loss."""
    label_dropout: float = Field(0.1, ge=0, le=1)  # share of samples trained without condition
    vlb_weight: float = Field(1.0, ge=0)  # weight of the variational bound, for a learned variance
    support: Literal["all", "visible"] = "all"
    """``visible``: for networks that see a part of x in training, only the error on that part."""
    reconstruction: float = Field(0.0, ge=0)
    """Weight of the squared difference to the noisy input on the unseen part (MaskDiT,
    arXiv:2306.09305, with ``support`` visible and 0.1)."""

    def build(self, model: Any) -> Denoising:
        return Denoising(self, model.process)


class Denoising(nn.Module):
    """MSE of the prediction in its own view, weighted over noise levels, plus balance losses."""

    def __init__(self, config: DenoisingConfig, process: Process) -> None:
        super().__init__()
        self.config = config
        self.process = process
        self.times = config.times.build(process)
        self.weighting = config.weighting.build(process)

    @property
    def lr(self) -> float | None:
        """Learning rate of a learned weighting; None: that of the model."""
        return getattr(self.weighting, "lr", None)

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        t, eps, cond = drawn(self.times, batch.x, batch.cond, self.config.label_dropout, rng)
        x_t = self.process.diffuse(batch.x, eps, t)
        prediction = model(x_t, t, cond, sample_ids=batch.ids, rng=rng, progress=progress)
        per_sample = self.error(prediction, batch.x, eps, t)
        main = {"denoising": self.weighting.combine(per_sample, t, prediction.view)}
        if self.config.reconstruction and prediction.visible is not None:
            gap = (prediction.value.float() - x_t.float()).square()
            main["reconstruction"] = (
                self.config.reconstruction * mean_over(gap, ~prediction.visible).mean()
            )
        if prediction.variance is not None:
            main["vlb"] = self.config.vlb_weight * self._vlb(prediction, batch.x, x_t, t).mean()
        return Losses(
            main=main,
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=per_sample.detach(),
            noise=self.process.unit_time(t),
        )

    def error(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mean squared error per sample in the prediction's view, f32 [B]."""
        target = target_of(self.process, x0, eps, prediction.view, t)
        gap = (prediction.value.float() - target.float()).square()
        return mean_over(gap, prediction.visible if self.config.support == "visible" else None)

    def _vlb(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound with the mean detached (improved DDPM): trains the variance."""
        assert prediction.variance is not None
        denoised = convert(self.process, prediction.value.detach(), prediction.view, "x0", x_t, t)
        return vlb_bits(self.process, x0, x_t, t, denoised, prediction.variance)


def drawn(
    times: Times, x0: Tensor, cond: Condition, dropout: float, rng: Generator
) -> tuple[Tensor, Tensor, Condition]:
    """What a step of training draws for x0 [B, ...]: times [B], noise of x0's shape, and the
    condition with a share ``dropout`` of its rows null; always in this order."""
    B, device = x0.shape[0], x0.device
    t = own(times.sample(whole(B), rng)).to(device)
    eps = normal(x0.shape, rng).to(device)
    chance = uniform((B,), rng).to(device)
    return t, eps, drop_some(cond, chance, dropout)


def drop_some(cond: Condition, chance: Tensor, share: float) -> Condition:
    """The null condition where ``chance`` [B], uniform in [0, 1), is below ``share``."""
    if share == 0 or not cond.tensors():
        return cond
    return cond.drop(chance < share)


def mean_over(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of values [B, ...] per sample, [B], over the parts ``where`` (bool over the leading
    dimensions) is True; None: all. 0 where a sample has no such part."""
    if where is None:
        return values.flatten(1).mean(1)
    parts = values.reshape(*where.shape, -1).mean(-1) * where
    return parts.flatten(1).sum(1) / where.flatten(1).sum(1).clamp_min(1)
