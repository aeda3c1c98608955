"""The output of an expert layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coterie.core.routing import Routing


@dataclass(frozen=True, eq=False)
class ExpertOutput:
    """Output of an expert layer."""

    y: Tensor  # [B, N, D], in the input's float type
    routings: tuple[Routing, ...]  # one per round
    state: Tensor | None = None  # state of a recurrent router, for the next layer
