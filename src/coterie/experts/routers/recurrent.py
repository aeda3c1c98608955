"""A router with memory across layers (RMoE, arXiv:2408.06793).

``u = W1 x``; ``h = cell(u, h_before)``; ``logits = W2 h``. The state h [R, P] travels in
``ctx.state`` from layer to layer at the same row; it starts at zero in each forward pass. The cell
is meant to be ONE module for all layers: build each layer, then call :func:`share_cells`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.experts.routers.base import SCORES, Scored, ScoreModule, ScorePart
from coterie.experts.routers.scores import init_linear, linear_f32


@SCORES.register
class RecurrentScore(ScorePart):
    """``cell`` gru or rnn (tanh); ``detach`` stops the gradient to earlier layers (ablation)."""

    kind: Literal["recurrent"] = "recurrent"
    state: PositiveInt = 256
    cell: Literal["gru", "rnn"] = "gru"
    detach: bool = False
    init_std: float = 0.02

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return RecurrentModule(self, width, num_experts)


class RecurrentModule(ScoreModule):
    """One layer's projections and a (shareable) recurrent cell."""

    def __init__(self, config: RecurrentScore, width: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        cell = nn.GRUCell if config.cell == "gru" else nn.RNNCell
        self.inner = nn.Linear(width, config.state, bias=False)
        self.cell: nn.Module = cell(config.state, config.state)
        self.proj = nn.Linear(config.state, num_experts, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        before = ctx.state
        if before is None:
            before = x.new_zeros(x.shape[0], self.config.state)
        elif self.config.detach:
            before = before.detach()
        if before.shape != (x.shape[0], self.config.state):
            raise ValueError(
                f"router state {tuple(before.shape)} does not fit "
                f"{(x.shape[0], self.config.state)}: recurrent layers need one unit and size"
            )
        # The cell's own kernels, with float32 weights whatever they are stored in.
        step = torch.gru_cell if self.config.cell == "gru" else torch.rnn_tanh_cell
        weights = [parameter.float() for parameter in self.cell.parameters()]
        state = step(linear_f32(self.inner, x), before.float(), *weights)
        return Scored(linear_f32(self.proj, state), state=state)

    def reset_parameters(self, rng: Generator | None) -> None:
        init_linear(self.inner, self.config.init_std, rng)
        init_linear(self.proj, self.config.init_std, rng)
        bound = self.config.state**-0.5
        for parameter in self.cell.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=rng)


def share_cells(modules: Iterable[nn.Module]) -> None:
    """Make all recurrent routers found in ``modules`` use the first one's cell."""
    first: nn.Module | None = None
    for module in modules:
        for part in module.modules():
            if isinstance(part, RecurrentModule):
                first = part.cell if first is None else first
                part.cell = first
