"""One embedding of noise level and label, and the Context that expert layers get.

Shapes: B batch, N tokens, D width, S steps of the original grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.nn.embed import LabelEmbedding

TIME_EMBEDDING, EMBEDDING = "time_embedding", "embedding"
"""Their names in ``Context.known``."""


@runtime_checkable
class Embeds(Protocol):
    """A backbone whose embedding of noise level and label does not depend on x."""

    @property
    def embeds_label(self) -> bool:
        """Whether ``embedding`` depends on the label."""
        ...

    def embed(self, ctx: Context, cond: Condition) -> Context:
        """The Context that its slots and adaptive maps read."""
        ...


def embed_condition(
    ctx: Context,
    cond: Condition,
    time: Callable[[Tensor], Tensor],
    label: LabelEmbedding | None,
    tokens: int,
) -> Context:
    """The Context of a denoiser's slots: ``embedding`` is tau(t), plus the label's row if there are
    classes.

    Values in ``ctx.known`` are used instead of computing them. ``ctx.label`` is the label after
    dropout.
    """
    known = ctx.known or {}
    tau_BD = known.get(TIME_EMBEDDING)
    if tau_BD is None:
        assert ctx.time_input is not None
        tau_BD = time(ctx.time_input)
    embedding_BD = tau_BD
    if label is not None:
        shape = None if cond.label is None else tuple(cond.label.shape)
        if cond.label is None or shape != (ctx.batch,):
            raise DataError(describe("cond.label", shape, f"labels [B], B = {ctx.batch}"))
        embedding_BD = known.get(EMBEDDING)
        if embedding_BD is None:
            embedding_BD = tau_BD + label(cond.label)
    return ctx.replace(
        tokens=tokens,
        time_embedding=tau_BD,
        embedding=embedding_BD,
        time_table=_Table(time, ctx.time_inputs),
        label=cond.label,
        task=cond.task,
        positions=torch.arange(tokens, device=tau_BD.device),
    )


def label_tokens(label: LabelEmbedding | None, cond: Condition) -> Tensor | None:
    """The label's embedding as one token [B, 1, D] to attend to; None without classes."""
    if label is None or cond.label is None:
        return None
    row: Tensor = label(cond.label)
    return row[:, None]


class _Table:
    """tau of every step of the original grid, computed once per forward pass and only if asked."""

    def __init__(self, time: Callable[[Tensor], Tensor], inputs: Tensor | None) -> None:
        self.time, self.inputs = time, inputs
        self.value: Tensor | None = None

    def __call__(self) -> Tensor:
        """[S, D], differentiable."""
        if self.value is None:
            assert self.inputs is not None
            self.value = self.time(self.inputs)
        return self.value
