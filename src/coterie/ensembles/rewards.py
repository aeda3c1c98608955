"""Rewards for tilted compositions: functions of a sample that are larger where it is better.

They are evaluated at the noisy state and differentiable in x, row by row. Their share rises from 0
in pure noise to 1 in clean data, so they need not depend on the noise level. Shapes: B batch, C
channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part, Registry
from coterie.denoiser import MODELS
from coterie.ensembles.product_rates import Reward

REWARDS = Registry("reward", "coterie.rewards")


@REWARDS.register
class BrightnessConfig(Part):
    """The mean of a sample's values: the brightness of a picture in [-1, 1]."""

    kind: Literal["brightness"] = "brightness"

    def build(self) -> Reward:
        return _brightness


def _brightness(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return x.flatten(1).mean(1)


@REWARDS.register
class SymmetryConfig(Part):
    """Minus the mean squared difference to the mirror image; 0 for symmetric pictures."""

    kind: Literal["symmetry"] = "symmetry"
    axis: Literal["left_right", "up_down"] = "left_right"  # direction of the mirroring

    def build(self) -> Reward:
        return _Symmetry(-1 if self.axis == "left_right" else -2)


@dataclass(frozen=True)
class _Symmetry:
    axis: int

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if x.dim() < -self.axis + 1:
            raise DataError(describe("x.shape", tuple(x.shape), "[B, ..., H, W]", "no picture"))
        return -(x - x.flip(self.axis)).square().flatten(1).mean(1)


@REWARDS.register
class ClassConfig(Part):
    """log p(label | x) of a trained classifier of clean samples."""

    kind: Literal["class"] = "class"
    network: Annotated[SerializeAsAny[Part], MODELS.validator]  # model with class logits
    label: int | None = Field(None, ge=0)  # class; null: that of each sample's condition

    def build(self) -> Reward:
        if not getattr(self.network, "is_trained", False):
            hint = '{"kind": "pretrained", "path": RUN} of a trained reader'
            raise ConfigError(describe("network", self.network.kind, "a trained model", hint))
        return ClassReward(self.network.build().eval(), self.label)


class ClassReward:
    """``network(x [B, ...])`` returns logits [B, K], or a Prediction of them."""

    def __init__(self, network: nn.Module, label: int | None = None) -> None:
        # Not a part of the composition's own weights: it is read from where it lies.
        self.network, self.label = network.requires_grad_(False), label

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        own = next(self.network.parameters(), x)
        if own.device != x.device:
            self.network.to(x.device)
        answer: Any = self.network(x.to(own.dtype))
        logits: Tensor = answer.value if isinstance(answer, Prediction) else answer
        if logits.dim() != 2:
            allowed = "class logits [B, K]"
            raise DataError(describe("reward.network", tuple(logits.shape), allowed))
        wanted = self._labels(len(x), logits.shape[1], cond).to(logits.device)
        return logits.float().log_softmax(1).gather(1, wanted[:, None])[:, 0]

    def _labels(self, batch: int, classes: int, cond: Condition) -> Tensor:
        if self.label is None and cond.label is None:
            hint = "say which class, or sample with labels"
            raise ConfigError(describe("reward.label", None, f"0..{classes - 1}", hint))
        given = cond.label if self.label is None else torch.full((batch,), self.label)
        assert given is not None
        if bool(((given < 0) | (given >= classes)).any()):
            wrong = int(given[(given < 0) | (given >= classes)][0])
            raise ConfigError(describe("reward.label", wrong, f"0..{classes - 1}"))
        return given
