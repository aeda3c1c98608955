"""Tasks of guidance networks: training losses, and likelihoods for guidance.

Tasks: ``classes`` (logits [B, K]), ``map`` (real numbers [B, M, H, W], such as depth) and
``pixels`` (logits [B, K, H, W], a class per pixel). Shapes: B batch, K classes, M maps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.core.context import NULL_LABEL
from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition

Task = Literal["classes", "map", "pixels"]
TASKS: tuple[Task, ...] = ("classes", "map", "pixels")


def distilled(task: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """f32 [B]: distance between the student's and the teacher's output.

    For classes and pixels KL(softmax(teacher / temperature) || softmax(student)), in nats; for maps
    the mean squared error.
    """
    student, teacher = student.float(), teacher.float()
    if task == "map":
        return (student - teacher).square().flatten(1).mean(1)
    wanted = F.log_softmax(teacher / temperature, dim=1)
    gap = (wanted.exp() * (wanted - F.log_softmax(student, dim=1))).sum(1)
    return gap.flatten(1).mean(1) if task == "pixels" else gap


def supervised(task: str, answer: Tensor, x0: Tensor, label: Tensor | None) -> Tensor:
    """f32 [B]: error against the data. Targets for maps and pixels are computed from the clean
    picture x0 (and its class)."""
    answer = answer.float()
    if task == "map":
        return (answer - height_map(x0)).square().flatten(1).mean(1)
    classes = answer.shape[1] - (task == "pixels")
    label = checked(label, classes)
    if task == "pixels":
        wanted = pixel_classes(x0, label)
        return F.cross_entropy(answer, wanted, reduction="none").flatten(1).mean(1)
    return F.cross_entropy(answer, label, reduction="none")


def log_likelihood(task: str, answer: Tensor, cond: Condition) -> Tensor:
    """f32 [B]: log p(target | x_t) as the guide sees it. The target of classes is ``cond.label``
    (NULL_LABEL: none, 0), that of maps ``cond.channels`` [B, M, H, W] with a Gaussian of variance
    1/2, -|f - target|^2, that of pixels ``cond.channels`` [B, 1, H, W], class numbers."""
    answer = answer.float()
    if task == "classes":
        label = checked(cond.label, answer.shape[1], null=True)
        chosen = F.log_softmax(answer, dim=1).gather(1, label.clamp_min(0)[:, None])[:, 0]
        return torch.where(label == NULL_LABEL, torch.zeros_like(chosen), chosen)
    wanted = answer[:, :1] if task == "pixels" else answer
    target = cond.channels
    if target is None or target.shape != wanted.shape:
        found = None if target is None else tuple(target.shape)
        hint = "what the picture is to look like to the guide"
        raise DataError(describe("cond.channels", found, str(tuple(wanted.shape)), hint))
    if task == "map":
        return -(answer - target.float()).square().flatten(1).sum(1)
    numbers = checked(target[:, 0].round().long(), answer.shape[1], field="cond.channels")
    return -F.cross_entropy(answer, numbers, reduction="none").flatten(1).sum(1)


def target_of(task: str, answer: Tensor) -> Tensor:
    """The output as a target of guidance: the map itself, or the most likely class of each
    pixel."""
    return answer.argmax(1, keepdim=True).float() if task == "pixels" else answer


def checked(
    label: Tensor | None, classes: int, null: bool = False, field: str = "cond.label"
) -> Tensor:
    """DataError unless every label is a class (or, with ``null``, NULL_LABEL)."""
    first = NULL_LABEL if null else 0
    allowed = f"{first}..{classes - 1}, the classes of the guide"
    if label is None:
        raise DataError(describe(field, None, allowed))
    wrong = label[(label < first) | (label >= classes)]
    if wrong.numel():
        raise DataError(describe(field, int(wrong.flatten()[0]), allowed))
    return label


def height_map(x0: Tensor) -> Tensor:
    """A map of little pictures that stands for depth: the share of inked pixels in the 3 x 3 around
    each, in [0, 1]; f32 [B, C, H, W] in [-1, 1] -> [B, 1, H, W]."""
    ink = (x0.float().mean(1, keepdim=True) > 0).float()
    return F.avg_pool2d(F.pad(ink, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def pixel_classes(x0: Tensor, label: Tensor) -> Tensor:
    """i64 [B, H, W]: 0 where there is no ink, else 1 + the class of the picture."""
    ink = x0.float().mean(1) > 0
    return torch.where(ink, label[:, None, None] + 1, 0)
