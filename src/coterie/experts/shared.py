"""Shared experts: used by every token, outside the router's softmax and all balance losses."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.config import Config
from coterie.core.numbers import Few
from coterie.experts.dispatch.expert_weights import experts_of
from coterie.experts.dispatch.single_expert import run_one
from coterie.experts.kinds import ExpertKind, ExpertPool
from coterie.experts.routers.scores import init_linear, linear_f32


class SharedConfig(Config):
    """Experts that every token uses, of the same kind as the routed ones."""

    hidden: PositiveInt  # inner size of each
    count: Few = 1  # number of shared experts
    gate: Literal["one", "self"] = "one"
    """``one``: weight 1; the experts are merged into one of inner size count * hidden (the same
    function). ``self``: a gate computed from the input, a sigmoid for one expert and a softmax for
    several (Qwen2-MoE, HoME)."""
    scale: float = 1.0  # factor of their output (0.5 in RMoE's released code)

    def build(self, kind: ExpertKind, width: int) -> SharedExperts:
        return SharedExperts(self, kind, width)


class SharedExperts(nn.Module):
    """The shared experts: ``forward(x [..., D]) -> [..., D]``."""

    def __init__(self, config: SharedConfig, kind: ExpertKind, width: int) -> None:
        super().__init__()
        merged = config.gate == "one"
        self.scale = config.scale
        hidden = config.hidden * (config.count if merged else 1)
        self.pool = ExpertPool(kind.with_hidden(hidden), 1 if merged else config.count, width)
        self.gate = None if merged else nn.Linear(width, config.count, bias=False)
        self.reset_parameters()

    def reset_parameters(self, rng: Generator | None = None, std: float | None = None) -> None:
        self.pool.reset_parameters(rng)
        if self.gate is not None and self.gate.weight.device.type != "meta":
            init_linear(self.gate, std, rng)

    def forward(self, x: Tensor) -> Tensor:
        answers = [run_one(self.pool.kind, x, weights) for weights in experts_of(self.pool)]
        if self.gate is None:
            return answers[0] if self.scale == 1.0 else self.scale * answers[0]
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = linear_f32(self.gate, x.float())
        gates = logits.sigmoid() if len(answers) == 1 else logits.softmax(dim=-1)
        total = torch.zeros_like(x)
        for gate, answer in zip(gates.to(x.dtype).unbind(-1), answers):
            total = total + gate[..., None] * answer
        return total if self.scale == 1.0 else self.scale * total
