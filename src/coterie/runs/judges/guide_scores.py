"""What a guide knows at every noise level, on held-out pictures: errors, gradients, sizes.

Shapes: B batch, K ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.core.batch import Batch
from coterie.core.context import NULL_LABEL
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.data import order
from coterie.guides import Guide, pixel_classes
from coterie.guides.tasks import distilled, log_likelihood, supervised, target_of

LOOKED_AT = 256  # held-out pictures
LEVELS = 10  # noise levels at which a guide is looked at
TEMPERATURE = 0.25  # of the teacher in what is reported, whatever training took


@dataclass
class Level:
    """Means over samples at one noise level, in [0, 1]; ``right``: share of classes (or pixels)
    that are right; None where nothing tells."""

    noise: float
    range: int
    distillation: float
    cosine: float
    right: float | None = None
    error: float | None = None


@dataclass
class GuideMeasures:
    """``levels`` from clean to noisy; ``trained``: numbers that are trained, in all experts."""

    levels: list[Level] = field(default_factory=list)
    trained: int = 0
    base: int = 0
    ranges: int = 1

    def flat(self) -> dict[str, float]:
        """What claims compare: means over all noise levels, and of each range's."""
        out = {
            "guide_parameters": float(self.trained),
            "guide_share": self.trained / (self.base * self.ranges),
            "guide_loss": _mean([level.distillation for level in self.levels]),
            "gradient_cosine": _mean([level.cosine for level in self.levels]),
        }
        for name in ("right", "error"):
            known = [v for level in self.levels if (v := getattr(level, name)) is not None]
            if known:
                named = {"right": "guide_accuracy", "error": "guide_error"}[name]
                out[named] = _mean(known)
        for index in range(self.ranges if self.ranges > 1 else 0):
            inside = [level.distillation for level in self.levels if level.range == index]
            if inside:
                out[f"guide_loss_range_{index}"] = _mean(inside)
        return out

    def by_level(self) -> dict[str, float]:
        """The same by noise level, for reading."""
        out: dict[str, float] = {}
        for level in self.levels:
            at = f"noise {level.noise:.2f} (range {level.range})"
            out[f"distillation loss, {at}"] = level.distillation
            out[f"gradient cosine, {at}"] = level.cosine
            if level.right is not None:
                out[f"accuracy, {at}"] = level.right
        return out


def measured(guide: Guide, data: Any) -> GuideMeasures:
    """On held-out pictures of ``data``, a source configuration."""
    source = data.build(split="held_out")
    count = min(LOOKED_AT, len(source))
    return guide_measures(guide, source.get(order(0, 0, count, len(source))))


def guide_measures(guide: Guide, batch: Batch) -> GuideMeasures:
    """On clean pictures; labels are used for accuracy where there are some. Gradients are those of
    log p(what the network sees in the clean picture), of maps in another one: towards their own
    there is no way to go."""
    ranges = len(guide.names)
    trained = _in_experts(guide)
    base = sum(v.numel() for v in guide.network.parameters()) - trained
    out = GuideMeasures(trained=trained, base=base, ranges=ranges)
    was = guide.training
    guide.eval()
    teacher = guide.clean(batch.x)
    seen = _targets(guide, teacher)
    clean = _gradient(guide, batch.x, None, seen)
    for level in range(LEVELS):
        unit = (level + 0.5) / LEVELS
        t = guide.process.time_of_unit(torch.full((len(batch.x),), unit))
        eps = torch.randn(batch.x.shape, generator=generator(0, "guide", level))
        x_t = guide.process.diffuse(batch.x, eps, t)
        with torch.no_grad():
            answer = guide(x_t, t).value
        cosine = F.cosine_similarity(
            clean.flatten(1), _gradient(guide, x_t, t, seen).flatten(1), dim=1
        )
        out.levels.append(
            Level(
                unit,
                int(guide.ranges.range_at(guide.process, t)[0]),
                float(distilled(guide.task, answer, teacher, TEMPERATURE).mean()),
                float(cosine.mean()),
                *_right(guide.task, answer, batch),
            )
        )
    guide.train(was)
    return out


def _in_experts(guide: Guide) -> int:
    return sum(
        v.numel()
        for name, v in guide.network.named_parameters()
        if ".adapters.parts." in name or name.startswith("adapters.parts.")
    )


def _targets(guide: Guide, teacher: Tensor) -> Condition:
    if guide.task == "classes":
        return Condition(label=teacher.argmax(1))
    return Condition(channels=target_of(guide.task, teacher.roll(1, 0)))


def _gradient(guide: Guide, x: Tensor, t: Tensor | None, seen: Condition) -> Tensor:
    """Of log p with respect to the picture; ``t`` None: of the network as it is, on clean ones."""
    at = x.detach().requires_grad_(True)
    with torch.enable_grad():
        if t is None:
            log_prob = log_likelihood(guide.task, guide.base(at), seen)
        else:
            log_prob = guide.log_prob(at, t, seen)
        (found,) = torch.autograd.grad(log_prob.sum(), at)
    return found


def _right(task: str, answer: Tensor, batch: Batch) -> tuple[float | None, float | None]:
    label = batch.cond.label
    if task == "map":
        return None, float(supervised(task, answer, batch.x, None).mean())
    if label is None or bool((label == NULL_LABEL).any()):
        return None, None
    wanted: Any = label if task == "classes" else pixel_classes(batch.x, label)
    return float((answer.argmax(1) == wanted).float().mean()), None


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
