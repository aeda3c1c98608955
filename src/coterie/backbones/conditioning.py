"""Time and label become one embedding, and the slots are told what they need of both.

Shapes: B batch, N tokens, D width, S steps of the original grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.nn.embed import LabelEmbedding


def embed_condition(
    ctx: Context,
    cond: Condition,
    time: Callable[[Tensor], Tensor],
    label: LabelEmbedding | None,
    tokens: int,
) -> Context:
    """The context of a denoiser's slots: ``embedding`` is tau(t), plus the label's row where the
    backbone has classes. ``ctx.label`` is the condition after dropout."""
    assert ctx.time_input is not None
    tau_BD = time(ctx.time_input)
    embedding_BD = tau_BD
    if label is not None:
        shape = None if cond.label is None else tuple(cond.label.shape)
        if cond.label is None or shape != (ctx.batch,):
            raise DataError(describe("cond.label", shape, f"labels [B], B = {ctx.batch}"))
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
    """The label's row as one token [B, 1, D]: what others may attend to; None without classes."""
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
