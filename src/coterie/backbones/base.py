"""The interface of backbones, and their registry.

``backbone(x, context, cond) -> BackboneOutput``. A backbone has tokens, conditions and expert
slots; processes, views and losses are handled outside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from coterie.backbones.checks import check_told
from coterie.core.registry import Part, Registry
from coterie.core.routing import Routing
from coterie.experts.routers.config import within

BACKBONES = Registry("backbone", "coterie.backbones")

TOLD_BY_DENOISERS = frozenset({"time_embedding", "step_index", "label", "task"})
"""Fields of the Context that the slots of an ordinary denoiser's backbone find set."""


class BackbonePart(Part):
    """Base of backbone configurations."""

    answers: ClassVar[Literal["sample", "logits", "tasks"]] = "sample"
    """``sample``: x's shape in, x's shape out; ``logits``: token ids in, logits out; ``tasks``:
    one logit per task out."""
    told: ClassVar[frozenset[str]] = frozenset()
    """Context fields that its slots find set (``label`` and ``task`` where the data have them)."""

    def check_told(self, told: Collection[str], teller: str = "this backbone") -> None:
        """ConfigError if a router needs a Context field that is not among ``told``."""
        trunk = getattr(self, "trunk", None)
        slots = getattr(self if trunk is None else trunk, "slots", ())
        if trunk is None:
            check_told(slots, told, teller)
        else:
            within("trunk", partial(check_told, slots, told, teller))


@dataclass(frozen=True, eq=False)
class BackboneOutput:
    """The output of a backbone."""

    sample: Tensor  # of x's shape; or logits [B, N, V], or [B, T] for tasks
    routings: tuple[Routing, ...] = ()  # of every expert layer in the pass
    variance: Tensor | None = None  # of x's shape, if the variance is learned
    visible: Tensor | None = None  # bool [B, ...]: parts of x that the network saw; None: all
