"""Objectives for text: next token, and masked diffusion.

Shapes: B batch, N positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional as F

from coterie.core.batch import Batch, Losses
from coterie.core.registry import Part
from coterie.core.share import over_batch, own, uniform, whole
from coterie.train.objectives.base import OBJECTIVES

BITS = 1 / math.log(2)


@OBJECTIVES.register
class NextTokenConfig(Part):
    """Cross entropy of each token given those before it."""

    kind: Literal["next_token"] = "next_token"

    def build(self, model: Any) -> NextToken:
        return NextToken()


class NextToken:
    """Cross entropy of token n+1 given tokens up to n, in nats per token. Padding
    (``cond.tokens_mask`` False) is neither read nor predicted."""

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        ids_BN, cond = batch.x, batch.cond
        t = torch.zeros(ids_BN.shape[0], device=ids_BN.device)
        real_BN = real_tokens(batch)
        if cond.tokens_mask is not None:
            cond = cond.replace(tokens_mask=cond.tokens_mask[:, :-1])
        prediction = model(
            ids_BN[:, :-1], t, cond, sample_ids=batch.ids, rng=rng, progress=progress
        )
        nats = token_nats(prediction.value, ids_BN[:, 1:]) * real_BN[:, 1:]
        counts_B = real_BN[:, 1:].sum(1)
        mean = over_batch(nats.sum(), counts_B.sum())
        return Losses(
            main={"next_token": mean},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=nats.detach().sum(1) / counts_B.clamp_min(1),
            extras={"bits_per_token": mean.detach() * BITS},
        )


@OBJECTIVES.register
class MaskedTokenConfig(Part):
    """Masked (absorbing) diffusion: cross entropy of the masked tokens."""

    kind: Literal["masked_token"] = "masked_token"
    lowest: float = Field(1e-3, gt=0, lt=1)
    """least share of masked tokens t, which limits the weight 1/t"""

    def build(self, model: Any) -> MaskedToken:
        return MaskedToken(self.lowest)


class MaskedToken:
    """Masked diffusion with the linear schedule: mask with probability t, weight 1/t.

    The mean over t is a bound on the negative log-likelihood in nats per token (MDLM,
    arXiv:2406.07524; LLaDA, arXiv:2502.09992). Times are stratified over the batch.
    """

    def __init__(self, lowest: float) -> None:
        self.lowest = lowest

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        ids_BN = batch.x
        B, N = ids_BN.shape
        t = (torch.rand(1, generator=rng) + own(torch.arange(whole(B)) / whole(B))) % 1.0
        t = (self.lowest + (1 - self.lowest) * t).to(ids_BN.device)
        real_BN = real_tokens(batch)
        masked = (uniform((B, N), rng).to(ids_BN.device) < t[:, None]) & real_BN
        noisy = torch.where(masked, model.mask_token, ids_BN)
        prediction = model(noisy, t, batch.cond, sample_ids=batch.ids, rng=rng, progress=progress)
        nats = token_nats(prediction.value, ids_BN) * masked
        bound = nats.sum(1) / (t * real_BN.sum(1).clamp_min(1))
        return Losses(
            main={"masked_token": bound.mean()},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=bound.detach(),
            noise=t,
            extras={"bits_per_token": bound.detach().mean() * BITS},
        )


def real_tokens(batch: Batch) -> Tensor:
    """bool [B, N]: False = padding."""
    mask = batch.cond.tokens_mask
    return torch.ones_like(batch.x, dtype=torch.bool) if mask is None else mask


def token_nats(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """-log p of each token, f32 [B, N]."""
    flat = F.cross_entropy(logits_BNV.float().flatten(0, 1), ids_BN.flatten(), reduction="none")
    return flat.reshape(ids_BN.shape)
