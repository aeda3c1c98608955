"""What every backbone answers, and the registry of backbones.

A backbone is ``backbone(x, context, cond) -> BackboneOutput``. It knows tokens, conditions and
expert slots; it knows nothing about processes, views or losses.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coterie.core.registry import Registry
from coterie.core.routing import Routing

BACKBONES = Registry("backbone", "coterie.backbones")


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
