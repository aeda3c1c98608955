"""What every backbone answers, and the registry of backbones.

A backbone is ``backbone(x, context, cond) -> BackboneOutput``. It knows tokens, conditions and
expert slots; it knows nothing about processes, views or losses.
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
    """Fields of the Context that its slots find set wherever the model runs (``label`` and
    ``task`` where the data have them)."""

    def check_told(self, told: Collection[str], teller: str = "this backbone") -> None:
        """ConfigError where a router reads what is not among ``told``."""
        trunk = getattr(self, "trunk", None)
        slots = getattr(self if trunk is None else trunk, "slots", ())
        if trunk is None:
            check_told(slots, told, teller)
        else:
            within("trunk", partial(check_told, slots, told, teller))


@dataclass(frozen=True, eq=False)
class BackboneOutput:
    """``sample`` has x's shape (or [B, N, V] logits); ``variance`` only for learned variances.

    ``visible``: which parts of x the network saw, bool [B, ...] over x's leading dimensions; None:
    all of it.
    """

    sample: Tensor
    routings: tuple[Routing, ...] = ()
    variance: Tensor | None = None
    visible: Tensor | None = None
