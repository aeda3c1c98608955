"""The tensors: a network's weights cut and copied, and router rows that share out real inputs.

Legend: D width, F inner size, N copies, s slices, E = N s experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from coterie.convert.config import UpcycleConfig
from coterie.core.errors import ConfigError, describe
from coterie.experts import ExpertKind

RIDGE = 1e-2  # share of the mean variance added to each direction's before dividing by it


def cut(kind: ExpertKind, tensors: Mapping[str, Tensor], slices: int) -> dict[str, Tensor]:
    """One network of ``kind`` as ``slices`` experts [s, ...] that add up to it.

    Names as in ``kind.shapes``. Right for any activation that works unit by unit.
    """
    if kind.kind == "gelu_mlp":
        return {
            "up": torch.stack(tensors["up"].chunk(slices)),
            "up_bias": torch.stack(tensors["up_bias"].chunk(slices)),
            "down": torch.stack(tensors["down"].chunk(slices, dim=1)),
            "down_bias": (tensors["down_bias"] / slices).expand(slices, -1),
        }
    if kind.kind == "swiglu":
        gate, up = (half.chunk(slices) for half in tensors["gate_up"].chunk(2))
        return {
            "gate_up": torch.stack([torch.cat(pair) for pair in zip(gate, up)]),
            "down": torch.stack(tensors["down"].chunk(slices, dim=1)),
        }
    raise ConfigError(describe("experts", kind.kind, "gelu_mlp or swiglu"))


def copy(pieces: Mapping[str, Tensor], config: UpcycleConfig, rng: Generator) -> dict[str, Tensor]:
    """The slices [s, ...] ``config.copies`` times, as stacks [E, ...], with noise if wanted."""
    out = {}
    for name, piece in pieces.items():
        stack = torch.cat([piece] * config.copies)
        if config.noise:
            drawn = torch.randn(stack.shape, generator=rng).to(stack)
            stack = stack + config.noise * piece.std(correction=0) * drawn
        out[name] = stack
    return out


def router_rows(
    config: UpcycleConfig, width: int, rng: Generator, inputs_TD: Tensor | None = None
) -> Tensor:
    """f32 [E, D]: a row per copy, repeated for its slices.

    With inputs, the copies' logits have mean 0, equal variance and no correlation on them: drawn in
    the space in which the inputs are white, off the direction of their mean. Otherwise random
    rows of one length, for inputs that a norm has given unit variance.
    """
    count = config.copies if config.repeat_rows else config.num_experts
    drawn = torch.randn(max(count, 1), width, generator=rng, dtype=torch.float64)
    if inputs_TD is None:
        rows_ND = drawn / drawn.norm(dim=1, keepdim=True)
    else:
        rows_ND = _balanced(drawn, inputs_TD.detach().cpu().flatten(0, -2).double())
    rows_ND = (config.logit_std * rows_ND).float()
    return rows_ND.repeat_interleave(config.slices, dim=0) if config.repeat_rows else rows_ND


def _balanced(drawn_ND: Tensor, x_TD: Tensor) -> Tensor:
    if len(x_TD) < 2 or not bool(torch.isfinite(x_TD).all()):
        raise ConfigError(describe("calibration", tuple(x_TD.shape), "two or more finite inputs"))
    mean_D = x_TD.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(x_TD.T))
    values = values.clamp_min(0) + RIDGE * values.mean().clamp_min(1e-12)
    whiten = vectors * values.rsqrt()  # x @ whiten has unit variance in every direction
    off = mean_D @ whiten
    off = off / off.norm().clamp_min(1e-12)
    drawn_ND = drawn_ND - (drawn_ND @ off)[:, None] * off
    if len(drawn_ND) < drawn_ND.shape[1]:  # orthogonal, so that no two copies want the same
        drawn_ND = torch.linalg.qr(drawn_ND.T).Q.T
    rows_ND = drawn_ND @ whiten.T
    return rows_ND / (x_TD @ rows_ND.T).std(dim=0).clamp_min(1e-12)[:, None]
