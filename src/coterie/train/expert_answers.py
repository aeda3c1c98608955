"""What each expert of a model answers to the rows that choose it, summed up while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.core.routing import Routing
from coterie.experts import ExpertLayer
from coterie.experts.dispatch.backends import OneExpert, experts_of
from coterie.experts.kinds.base import ExpertKind
from coterie.inspect import Answers, Place

ROWS = 32
"""Rows (tokens) per expert and call that are looked at; whole samples where samples are routed."""
SAMPLES = 4
ENOUGH = 2048
"""Rows of an expert after which it is looked at no more."""
SILENT = 1e-4
"""An activation below this share of the root mean square counts as zero."""


class _Watched(OneExpert):
    """Weights that note what the last map of an expert reads: its inner activations."""

    def __init__(self, expert: OneExpert, kind: ExpertKind) -> None:
        super().__init__(expert.parameters, expert.buffers)
        self.ends = kind.ends
        self.inner: Tensor | None = None

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        if weight in self.ends:
            self.inner = x
        return super().linear(x, weight, bias)


class AnswerMeter:
    """Sums over the answers of every expert: rows, numbers, their sum, squares and zeros, [5, E].

    Of each layer the first round only: later ones read what the one before wrote.
    """

    def __init__(self) -> None:
        self._sums: dict[Place, np.ndarray] = {}

    @torch.no_grad()
    def look(self, layer: ExpertLayer, h: Tensor, routing: Routing) -> None:
        place = Place(routing.slot, routing.layer, routing.round)
        sums = self._sums.setdefault(place, np.zeros((5, routing.num_scored)))
        chosen = routing.one_hot() > 0
        limit = ROWS if routing.unit == "token" else SAMPLES
        experts, slots = experts_of(layer.pool), layer.config.slot_map
        read = h.flatten(0, 1) if routing.unit == "token" else h
        for candidate in np.flatnonzero(sums[0] < ENOUGH).tolist():
            rows = chosen[:, candidate].nonzero()[:limit, 0]
            if not len(rows):
                continue
            x = read.index_select(0, rows)
            x = x if layer.stem is None else layer.stem(x)  # what the experts read
            expert = experts[candidate if slots is None else slots[candidate]]
            sums[:, candidate] += _sums(layer.pool.kind, expert, x)

    def answers(self) -> dict[Place, Answers]:
        """By router; NaN for experts that nobody chose."""
        out = {}
        for place, (rows, count, total, squares, zeros) in self._sums.items():
            with np.errstate(invalid="ignore"):
                mean, share = total / count, zeros / count
                std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
            out[place] = Answers(mean, std, share, rows)
        return out


def _sums(kind: ExpertKind, expert: OneExpert, x: Tensor) -> np.ndarray:
    watched = _Watched(expert, kind)
    answer = kind.forward(x, watched).double()
    zeros = zero_share(answer)
    if watched.inner is not None and watched.inner is not x:
        zeros = max(zeros, zero_share(watched.inner))
    count = answer.numel()
    total, squares = float(answer.sum()), float(answer.square().sum())
    return np.array([len(x), count, total, squares, zeros * count])


def zero_share(values: Tensor) -> float:
    """Share of the values that are (nearly) 0; 1 where all are."""
    scale = values.double().square().mean().sqrt()
    return float((values.abs() <= SILENT * scale).double().mean())


@contextmanager
def watched_answers(model: nn.Module) -> Iterator[AnswerMeter]:
    """Inside the block every call of an expert layer is looked at."""
    meter = AnswerMeter()

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, ExpertLayer)
        h, mask = inputs[0], inputs[1].token_mask
        # Padding may hold anything; rows of it are chosen by nobody, but samples hold it too.
        h = h if mask is None else h.masked_fill(~mask[:, :, None], 0.0)
        meter.look(layer, h, output.routings[0])

    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()
