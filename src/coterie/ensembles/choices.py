"""Choice of members per sample, given the posterior over their clusters.

``dense`` uses all and is exact; ``top_k``, ``top_p`` (nucleus), ``fixed`` are those of token
routers; ``sampled`` draws one; ``oracle`` uses the true cluster. Shapes: B batch, K members.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import DataError, describe
from coterie.core.numbers import Seed
from coterie.core.prediction import Condition
from coterie.core.registry import Part, Registry
from coterie.experts.routers.base import SelectPart
from coterie.experts.routers.selections import Dense, Fixed, TopK, TopP

CHOICES = Registry("choice", "coterie.choices")
for _part in (Dense, TopK, TopP, Fixed):
    CHOICES.register(_part)


class ChoicePart(Part):
    """Base of choices that use more than the probabilities."""

    def choose(self, probs: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """i64 [B, k] of probs [B, K]; the id K marks an unused choice."""
        raise NotImplementedError


@CHOICES.register
class Sampled(ChoicePart):
    """One member drawn from the posterior, anew at every step.

    Decentralized Diffusion Models finds it far worse than the most probable one. The draw depends
    on a hash of the sample's own state, so it is reproducible and independent of the batch.
    """

    kind: Literal["sampled"] = "sampled"
    seed: Seed = 0  # of the draw

    def choose(self, probs: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        states = torch.cat([x.flatten(1).double(), t.double()[:, None]], dim=1).cpu().numpy()
        key = self.seed.to_bytes(8, "little", signed=True)
        draws = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in states]
        unit = torch.tensor(
            [int.from_bytes(draw, "little") / 2**64 for draw in draws], dtype=torch.float64
        )
        below = probs.detach().double().cpu().cumsum(1) <= unit[:, None]
        # Rounding may leave the last sum below 1: never beyond the last possible member.
        last = (probs.detach().cpu() > 0).long().mul(torch.arange(probs.shape[1])).amax(1)
        return torch.minimum(below.sum(1), last)[:, None].to(probs.device)


@CHOICES.register
class Oracle(ChoicePart):
    """The true cluster of each sample, from the condition; for analysis only."""

    kind: Literal["oracle"] = "oracle"
    cluster: Literal["task", "label"] = "task"  # field of the condition with the cluster

    def choose(self, probs: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        known: Tensor | None = getattr(cond, self.cluster)
        count = probs.shape[1]
        allowed = f"a cluster 0..{count - 1} per sample"
        if known is None:
            raise DataError(describe(f"cond.{self.cluster}", None, allowed))
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < count:
            raise DataError(describe(f"cond.{self.cluster}", known.tolist(), allowed))
        return known[:, None]


def choose_ids(part: Part, probs: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """i64 [B, k], best first; members of probability 0 are never chosen (id K: unused)."""
    count = probs.shape[1]
    if isinstance(part, ChoicePart):
        ids = part.choose(probs, x, t, cond)
        dead = probs.gather(1, ids) == 0.0
        return ids.masked_fill(dead, count)
    assert isinstance(part, SelectPart)
    batch = probs.shape[0]
    keys = probs.detach().masked_fill(probs == 0.0, float("-inf"))
    return part.select(keys, Context(batch=batch, tokens=1), (batch, 1), None)
