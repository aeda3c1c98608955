"""Sampling text: token by token, or by unmasking (absorbing diffusion).

Shapes: B batch, N positions, V vocabulary. Sample i depends on its own seed only.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise


@torch.no_grad()
def generate_text(
    denoiser: Any,
    num: int,
    length: int,
    steps: int,
    noise: SampleNoise,
    *,
    start: int,
    temperature: float = 1.0,
) -> Tensor:
    """i64 [num, length]. ``steps``: for masked diffusion only; ``start``: first token of an
    autoregressive sample (end of the document before)."""
    if denoiser.config.masking == "next_token":
        return _autoregressive(denoiser, num, length, noise, temperature, start)
    return _unmask(denoiser, num, length, steps, noise, temperature)


def _autoregressive(
    denoiser: Any, num: int, length: int, noise: SampleNoise, temperature: float, start: int
) -> Tensor:
    ids_BN = torch.full((num, 1), start)
    t_B = torch.zeros(num)
    while ids_BN.shape[1] < length:
        logits_BV = denoiser(ids_BN, t_B, Condition()).value[:, -1]
        logits_BV[:, denoiser.mask_token] = float("-inf")
        token_B = _draw(logits_BV, noise.uniform((logits_BV.shape[-1],)), temperature)
        ids_BN = torch.cat([ids_BN, token_B[:, None]], dim=1)
    return ids_BN


def _unmask(
    denoiser: Any, num: int, length: int, steps: int, noise: SampleNoise, temperature: float
) -> Tensor:
    """From all masked (t = 1) to none: from t to s a masked token stays with probability s/t."""
    ids_BN = torch.full((num, length), denoiser.mask_token)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, s in pairwise(times):
        logits_BNV = denoiser(ids_BN, torch.full((num,), t), Condition()).value
        logits_BNV[..., denoiser.mask_token] = float("-inf")
        drawn_BN = _draw(logits_BNV, noise.uniform(tuple(logits_BNV.shape[1:])), temperature)
        reveal_BN = noise.uniform((length,)) >= s / t
        masked_BN = ids_BN == denoiser.mask_token
        ids_BN = torch.where(masked_BN & reveal_BN, drawn_BN, ids_BN)
    return ids_BN


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One draw per distribution by the Gumbel trick, [..., V] -> [...]."""
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
    return (logits / temperature + gumbel).argmax(-1)
