"""What an expert layer answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coterie.core.routing import Routing


@dataclass(frozen=True, eq=False)
class ExpertOutput:
    """``y`` [B, N, D] (float type of the input), one routing per round, the router state."""

    y: Tensor
    routings: tuple[Routing, ...]
    state: Tensor | None = None
