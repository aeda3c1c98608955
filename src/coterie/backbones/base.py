"""What every backbone answers, and the registry of backbones.

A backbone is ``backbone(x, context, cond) -> BackboneOutput``. It knows tokens, conditions and
expert slots; it knows nothing about processes, views or losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from coterie.core.registry import Part, Registry
from coterie.core.routing import Routing

BACKBONES = Registry("backbone", "coterie.backbones")

TOLD_BY_DENOISERS = frozenset({"time_embedding", "step_index", "label", "task"})
"""Fields of the Context that the slots of an ordinary denoiser's backbone find set."""


class BackbonePart(Part):
    """Base of backbone configurations."""

    answers: ClassVar[Literal["sample", "logits"]] = "sample"
    """``sample``: x's shape in, x's shape out; ``logits``: token ids in, logits out."""
    told: ClassVar[frozenset[str]] = frozenset()
    """Fields of the Context that its slots find set wherever the model runs (``label`` and
    ``task`` where the data have them)."""


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
