"""Two ways to learn text on one network: next token, and masked diffusion.

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
from coterie.train.objectives.base import OBJECTIVES

BITS = 1 / math.log(2)


@OBJECTIVES.register
class NextTokenConfig(Part):
    kind: Literal["next_token"] = "next_token"

    def build(self, model: Any) -> NextToken:
        return NextToken()


class NextToken:
    """Cross entropy of token n+1 given tokens up to n, in nats per token."""

    def __call__(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        ids_BN = batch.x
        t = torch.zeros(ids_BN.shape[0], device=ids_BN.device)
        prediction = model(
            ids_BN[:, :-1], t, batch.cond, sample_ids=batch.ids, rng=rng, progress=progress
        )
        nats = token_nats(prediction.value, ids_BN[:, 1:])
        return Losses(
            main={"next_token": nats.mean()},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=nats.detach().mean(1),
            extras={"bits_per_token": nats.detach().mean() * BITS},
        )


@OBJECTIVES.register
class MaskedTokenConfig(Part):
    """``lowest``: the smallest share of masked tokens, which bounds the weight 1/t."""

    kind: Literal["masked_token"] = "masked_token"
    lowest: float = Field(1e-3, gt=0, lt=1)

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
        t = (torch.rand(1, generator=rng) + torch.arange(B) / B) % 1.0
        t = (self.lowest + (1 - self.lowest) * t).to(ids_BN.device)
        masked = torch.rand(B, N, generator=rng).to(ids_BN.device) < t[:, None]
        noisy = torch.where(masked, model.mask_token, ids_BN)
        prediction = model(noisy, t, batch.cond, sample_ids=batch.ids, rng=rng, progress=progress)
        nats = token_nats(prediction.value, ids_BN) * masked
        bound = nats.sum(1) / (t * N)
        return Losses(
            main={"masked_token": bound.mean()},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=bound.detach(),
            noise=t,
            extras={"bits_per_token": bound.detach().mean() * BITS},
        )


def token_nats(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """-log p of each token, f32 [B, N]."""
    flat = F.cross_entropy(logits_BNV.float().flatten(0, 1), ids_BN.flatten(), reduction="none")
    return flat.reshape(ids_BN.shape)
