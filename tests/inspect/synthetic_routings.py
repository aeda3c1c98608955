"""Routings with a known truth, for tests of traces and reports."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from coterie.core.routing import Routing


def routing(
    ids: Tensor,
    num_experts: int,
    batch: tuple[int, int],
    *,
    unit: str = "token",
    probs: Tensor | None = None,
    **fields: object,
) -> Routing:
    """A record around choices ``ids`` [R] or [R, K]; E = nobody; gates 1/K; probs one-hot."""
    ids = ids if ids.dim() == 2 else ids[:, None]
    gates = (ids < num_experts).float() / ids.shape[1]
    if probs is None:
        probs = torch.zeros(len(ids), num_experts + 1).scatter_(1, ids, 1.0)[:, :num_experts]
    return Routing(
        unit=unit,  # type: ignore[arg-type]
        num_experts=num_experts,
        ids=ids,
        gates=gates,
        probs=probs,
        logits=probs.clamp(min=1e-6).log(),
        batch=batch,
        **fields,  # type: ignore[arg-type]
    )


def known_truth(
    rng: Generator,
    samples: int = 100,
    tokens: int = 16,
    num_experts: int = 10,
    num_classes: int = 10,
    noise: Tensor | None = None,
) -> list[Routing]:
    """Layer 0 chooses by noise bin, 1 by position, 2 by class, 3 at random (expert 7 is dead).

    A fifth of the samples is unconditional. ``noise`` f32 [B] fixes the noise level.
    """
    noise = torch.rand(samples, generator=rng) if noise is None else noise
    label = torch.randint(num_classes, (samples,), generator=rng)
    label[torch.rand(samples, generator=rng) < 0.2] = -1
    rows = samples * tokens

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(tokens)

    by_noise = spread((noise * num_experts).long().clamp(max=num_experts - 1))
    by_position = torch.arange(rows) % tokens % num_experts
    by_class = spread(label.clamp(min=0) % num_experts)
    at_random = torch.randint(num_experts - 1, (rows,), generator=rng)
    at_random[at_random >= 7] += 1
    choices = [by_noise, by_position, by_class, at_random]
    facts = {"noise": noise, "label": label, "sample_ids": torch.arange(samples)}
    return [
        routing(
            ids, num_experts, (samples, tokens), probs=soft(ids, num_experts, rng), **facts
        ).replace(layer=layer)
        for layer, ids in enumerate(choices)
    ]


def soft(ids: Tensor, num_experts: int, rng: Generator, sharpness: float = 3.0) -> Tensor:
    """Router probabilities [R, E] that favour the chosen expert."""
    logits = torch.randn(len(ids), num_experts, generator=rng)
    logits.scatter_add_(1, ids[:, None], torch.full((len(ids), 1), sharpness))
    return logits.softmax(1)
