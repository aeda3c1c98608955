"""A router with a recurrent state across layers (RMoE, arXiv:2408.06793).

``u = W1 x``; ``h = cell(u, h_before)``; ``logits = W2 h``. The state h [R, P] of a row is passed in
``ctx.state`` from layer to layer and starts anew in each forward pass, so nothing is carried over
between tokens, sampling steps or generated tokens. All layers of a slot share ONE cell: build each
layer, then call :func:`share_cells`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.tensors import effective
from coterie.experts.routers.base import SCORES, Scored, ScoreModule, ScorePart
from coterie.experts.routers.scores import init_linear, linear_f32


@SCORES.register
class RecurrentScore(ScorePart):
    """Logits from a recurrent state that is passed from layer to layer."""

    kind: Literal["recurrent"] = "recurrent"
    state: PositiveInt = 256  # size P of the state
    cell: Literal["gru", "rnn"] = "gru"  # rnn has the activation tanh
    detach: bool = False  # stop the gradient to earlier layers (ablation)
    head: Literal["linear", "cosine"] = "linear"
    """linear: W2 h; cosine: similarity of h to prototypes"""
    start: Literal["zeros", "time"] = "zeros"
    """first state: zeros, or a linear map of SiLU(time embedding)"""
    init_std: NonNegativeFloat = 0.02  # of the weights

    @property
    def reads(self) -> tuple[str, ...]:
        return ("time_embedding",) if self.start == "time" else ()

    @property
    def state_size(self) -> int:
        return self.state

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return RecurrentModule(self, width, num_experts, time_width or width)


class RecurrentModule(ScoreModule):
    """The linear maps of one layer, and ``memory``, the cell that the layers of a slot share."""

    def __init__(
        self, config: RecurrentScore, width: int, num_experts: int, time_width: int
    ) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(width, config.state, bias=False)
        self.proj = nn.Linear(config.state, num_experts, bias=False)
        self.memory = _Memory(config, time_width)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        before = self.memory.first(x, ctx) if ctx.state is None else ctx.state
        if before.shape != (x.shape[0], self.config.state):
            allowed = f"{(x.shape[0], self.config.state)}, rows and state"
            hint = "recurrent layers need one unit and size"
            raise ConfigError(describe("router state", tuple(before.shape), allowed, hint))
        if self.config.detach and ctx.state is not None:
            before = before.detach()
        state = self.memory(linear_f32(self.inner, x), before)
        if self.config.head == "linear":
            return Scored(linear_f32(self.proj, state), state=state)
        prototypes = effective(self.proj)["weight"].float()
        logits = F.normalize(state, dim=-1) @ F.normalize(prototypes, dim=-1).T
        return Scored(logits, prototypes=prototypes, state=state)

    def reset_parameters(self, rng: Generator | None) -> None:
        init_linear(self.inner, self.config.init_std, rng)
        init_linear(self.proj, self.config.init_std, rng)
        self.memory.reset_parameters(rng)


class _Memory(nn.Module):
    """The recurrent cell, and what its state is before the first layer."""

    def __init__(self, config: RecurrentScore, time_width: int) -> None:
        super().__init__()
        self.config = config
        cell = nn.GRUCell if config.cell == "gru" else nn.RNNCell
        self.cell: nn.Module = cell(config.state, config.state)
        self.seed = nn.Linear(time_width, config.state) if config.start == "time" else None

    def first(self, x: Tensor, ctx: Context) -> Tensor:
        """f32 [R, P]."""
        if self.seed is None:
            return x.new_zeros(x.shape[0], self.config.state)
        if ctx.time_embedding is None:
            hint = "start=time needs a network that embeds the noise level"
            raise ConfigError(describe("router.score.start", "time", "zeros", hint))
        seed = linear_f32(self.seed, F.silu(ctx.time_embedding.float()))
        return seed.repeat_interleave(x.shape[0] // max(1, len(seed)), dim=0)

    def forward(self, u: Tensor, before: Tensor) -> Tensor:
        # The cell's own kernels, with float32 weights whatever they are stored in.
        step = torch.gru_cell if self.config.cell == "gru" else torch.rnn_tanh_cell
        weights = [value.float() for value in effective(self.cell).values()]
        return step(u, before.float(), *weights)

    def reset_parameters(self, rng: Generator | None) -> None:
        bound = self.config.state**-0.5
        for parameter in self.cell.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=rng)
        if self.seed is not None:
            init_linear(self.seed, self.config.init_std, rng)


def share_cells(modules: Iterable[nn.Module]) -> None:
    """Make all recurrent routers found in ``modules`` use the first one's memory."""
    first: _Memory | None = None
    for module in modules:
        for part in module.modules():
            if isinstance(part, RecurrentModule):
                first = part.memory if first is None else first
                part.memory = first
