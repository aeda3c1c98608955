"""Statistics of each expert's outputs on the rows that choose it, accumulated call by call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from coterie.core.routing import Routing
from coterie.inspect.statistics.accumulators import Place
from coterie.inspect.statistics.anomalies import Answers

ROWS = 32
"""Rows (tokens) per expert and call that are looked at; whole samples where samples are routed."""
SAMPLES = 4
ENOUGH = 2048
"""Rows of an expert after which it is looked at no more."""
SILENT = 1e-4
"""An activation below this share of the root mean square counts as zero."""

Ask = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""(candidate, rows i64 [n]) -> its answers to them, and its inner activations if it has any."""


class AnswerSums:
    """Sums over the answers of every expert: rows, numbers, their sum, squares and zeros, [5, E]
    for each router."""

    def __init__(self) -> None:
        self._sums: dict[Place, np.ndarray] = {}

    @torch.no_grad()
    def look(self, routing: Routing, ask: Ask) -> None:
        """Ask every expert that ``routing`` chose about some of its rows."""
        place = Place(routing.slot, routing.layer, routing.round)
        sums = self._sums.setdefault(place, np.zeros((5, routing.num_scored)))
        chosen = routing.one_hot() > 0
        limit = ROWS if routing.unit == "token" else SAMPLES
        for candidate in np.flatnonzero(sums[0] < ENOUGH).tolist():
            rows = chosen[:, candidate].nonzero()[:limit, 0]
            if len(rows):
                sums[:, candidate] += _sums(len(rows), *ask(candidate, rows))

    def answers(self) -> dict[Place, Answers]:
        """By router; NaN for experts that nobody chose."""
        out = {}
        for place, (rows, count, total, squares, zeros) in self._sums.items():
            with np.errstate(invalid="ignore"):
                mean, share = total / count, zeros / count
                std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
            out[place] = Answers(mean, std, share, rows)
        return out


def _sums(rows: int, answer: Tensor, inner: Tensor | None) -> np.ndarray:
    answer = answer.double()
    zeros = zero_share(answer)
    if inner is not None:
        zeros = max(zeros, zero_share(inner))
    count = answer.numel()
    total, squares = float(answer.sum()), float(answer.square().sum())
    return np.array([rows, count, total, squares, zeros * count])


def zero_share(values: Tensor) -> float:
    """Share of the values that are (nearly) 0; 1 where all are."""
    scale = values.double().square().mean().sqrt()
    return float((values.abs() <= SILENT * scale).double().mean())
