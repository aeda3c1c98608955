"""Training of guidance networks: recognise clean or noisy pictures.

Targets come from the data, or from a network's output on the clean picture. A guide with several
noise ranges is trained range by range, from clean to noisy, each in an equal part of the steps.
Shapes: B batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Generator, Tensor, nn

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.core.registry import Part
from coterie.core.share import normal, own, whole
from coterie.guides import Guide, Reader
from coterie.guides.tasks import distilled, supervised
from coterie.process import TIMES, Times
from coterie.train.learning_rate import turn_at
from coterie.train.objectives.base import OBJECTIVES


def _times(value: Any) -> Part | None:
    return None if value is None else TIMES.parse(value)


@OBJECTIVES.register
class RecognitionConfig(Part):
    """Loss of a network that recognises classes, maps or pixels in clean or noisy pictures."""

    kind: Literal["recognition"] = "recognition"
    learn_from: Literal["data", "teacher"] = "data"
    """Targets: the ``data`` (the class, or what is computed from the picture), or a ``teacher``:
    the network under the guide, applied to the clean picture; labels are then not used."""
    times: Annotated[SerializeAsAny[Part] | None, BeforeValidator(_times)] = None
    """distribution of the noise levels; null: clean pictures only"""
    temperature: float = Field(0.25, gt=0)  # divides the teacher's logits (classes and pixels)
    first: Literal["base", "previous"] = "previous"
    """A range's expert starts from the network (``base``), or from the expert of the range before
    (``previous``)."""
    answers: ClassVar[str] = "recognition"

    def build(self, model: Any) -> Recognition:
        return Recognition(self, model)


class Recognition(nn.Module):
    """Per-sample loss of ``model(x_t, t)``; see :class:`RecognitionConfig`."""

    turn: Tensor

    def __init__(self, config: RecognitionConfig, model: Any) -> None:
        super().__init__()
        if not isinstance(model, Reader | Guide):
            hint = "its answer is not what a picture shows"
            allowed = "a model of kind reader or guide"
            raise ConfigError(describe("model", type(model).__name__, allowed, hint))
        if isinstance(model, Guide) == (config.times is None):
            found = None if config.times is None else config.times.kind
            allowed = "times for a guide, null for a reader"
            raise ConfigError(describe("objective.times", found, allowed))
        if config.learn_from == "teacher" and not isinstance(model, Guide):
            raise ConfigError(describe("objective.learn_from", "teacher", "data, for a reader"))
        self.config, self.task = config, model.task
        self.times = range_times(config.times, model) if isinstance(model, Guide) else []
        self.register_buffer("turn", torch.tensor(-1))

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        if not self.times:
            answer = model(batch.x).value
            return self._losses(batch, answer, None)
        index = self._begin(model, progress)
        t = own(self.times[index].sample(whole(len(batch.x)), rng)).to(batch.x.device)
        eps = normal(batch.x.shape, rng).to(batch.x)
        return self.at(model, batch, t, eps)

    def at(self, model: Guide, batch: Batch, t: Tensor, eps: Tensor) -> Losses:
        """At given times [B] and noise, with whichever experts belong there."""
        teacher = model.clean(batch.x) if self.config.learn_from == "teacher" else None
        x_t = model.process.diffuse(batch.x, eps, t)
        found = model(x_t, t, Condition(), sample_ids=batch.ids)
        losses = self._losses(batch, found.value, teacher)
        main, extras = losses.main, losses.extras
        unit = model.process.unit_time(t)
        return Losses(main, (), found.routings, losses.per_sample, unit, extras)

    def _losses(self, batch: Batch, answer: Tensor, teacher: Tensor | None) -> Losses:
        if teacher is None:
            label = batch.cond.label if self.task != "map" else None
            loss = supervised(self.task, answer, batch.x, label)
        else:
            loss = distilled(self.task, answer, teacher, self.config.temperature)
        return Losses(main={"recognition": loss.mean()}, per_sample=loss.detach())

    def _begin(self, model: Guide, progress: float) -> int:
        """The range whose turn it is; its expert starts where the one before has ended."""
        count = len(self.times)
        turn = turn_at(progress, count)
        index = count - 1 - turn
        if model.training and int(self.turn) != turn:
            if turn and self.config.first == "previous":
                model.start_from(index, index + 1)
            self.turn.fill_(turn)
        return index


def range_times(times: Part | None, model: Guide) -> list[Times]:
    """Training times of each range, the noisiest first; ConfigError where a range has next to none
    of them."""
    assert times is not None
    edges = [None, *model.ranges.times(model.process), None]
    if len(edges) == 2:
        return [times.build(model.process)]
    return [
        TIMES.parse({"kind": "within", "times": times, "low": low, "high": high}).build(
            model.process
        )
        for high, low in pairwise(edges)
    ]
