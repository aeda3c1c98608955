"""Adaptive layer norm (adaLN): shifts, scales and gates computed from noise level and label.

They depend on nothing else, so for a known sampling grid they can be computed in advance
(:mod:`coterie.cache`). Then ``Context.known`` holds them by the name of the linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from coterie.core.context import Context

Part = Literal["shift", "scale", "gate"]

BLOCK: tuple[Part, ...] = ("shift", "scale", "gate", "shift", "scale", "gate")
HEAD: tuple[Part, ...] = ("shift", "scale")


class AdaptiveLinear(nn.Linear):
    """A linear map of SiLU(embedding), split into ``parts`` of ``width`` channels.

    ``known_as``: its name in ``Context.known``, set by a cache.
    """

    def __init__(self, condition_width: int, width: int, parts: tuple[Part, ...]) -> None:
        super().__init__(condition_width, len(parts) * width)
        self.parts = parts
        self.known_as = ""


def adaptive(linear: nn.Module, ctx: Context, parts: tuple[Part, ...]) -> Sequence[Tensor]:
    """The parts [B, 1, D] that ``linear`` computes from the context's embedding; scales are 1 +
    scale.

    ``linear`` is an :class:`AdaptiveLinear`, or a module that replaces one.
    """
    if ctx.known is not None:
        found: Sequence[Tensor] | None = ctx.known.get(getattr(linear, "known_as", ""))
        if found is not None:
            return found
    assert ctx.embedding is not None
    made = linear(nn.functional.silu(ctx.embedding))[:, None].chunk(len(parts), dim=-1)
    return [1 + value if part == "scale" else value for part, value in zip(parts, made)]
