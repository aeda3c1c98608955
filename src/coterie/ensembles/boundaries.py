"""Noise-range boundaries with the least held-out loss, given the loss of each member per level.

Shapes: M members, N bins of the noise level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.rng import generator
from coterie.ensembles.base import Ensemble
from coterie.process import convert

MOST = 12  # members whose orders are all looked at


@dataclass(frozen=True)
class Cut:
    """Members and the boundaries between their ranges."""

    members: tuple[int, ...]  # numbers of those with a range, from noisy to clean
    boundaries: tuple[float, ...]  # between them, in the unit of the edges
    loss: float  # mean over bins
    best_alone: float  # mean loss of the best single member


def search_boundaries(
    losses: Sequence[Sequence[float]] | np.ndarray,
    edges: Sequence[float] | np.ndarray,
    *,
    keep_order: bool = False,
) -> Cut:
    """The contiguous ranges with the least mean loss, by dynamic programming over bins.

    ``losses`` [M, N] in one and the same view; ``edges`` [N + 1] from clean to noisy. Each member
    gets one range at most, some none. ``keep_order``: members are given from noisy to clean;
    otherwise every order is looked at. DataError for a table with gaps.
    """
    table, at = np.asarray(losses, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape or at.shape != (table.shape[1] + 1,):
        found = f"losses {table.shape}, edges {at.shape}"
        raise DataError(describe("table", found, "losses [M, N] and edges [N + 1]"))
    if not np.isfinite(table).all():
        member, column = (int(i) for i in np.argwhere(~np.isfinite(table))[0])
        hint = "measure every member in every bin"
        raise DataError(describe(f"losses[{member}][{column}]", None, "a finite number", hint))
    if len(table) > MOST and not keep_order:
        hint = "give them from noisy to clean, with keep_order"
        raise ConfigError(describe("members", len(table), f"at most {MOST}", hint))
    path, total = _best_path(table[:, ::-1], keep_order)
    owners = path[::-1]  # from clean to noisy again, like the edges
    turns = [n for n in range(len(owners) - 1, 0, -1) if owners[n] != owners[n - 1]]
    members = (owners[-1], *(owners[n - 1] for n in turns))
    alone = float(table.mean(1).min())
    boundaries = tuple(float(at[n]) for n in turns)
    return Cut(members, boundaries, total / table.shape[1], alone)


State = tuple[int, int]
"""Who answers now, and the set of those that have had a range, as bits."""


def _best_path(table: np.ndarray, keep_order: bool) -> tuple[list[int], float]:
    """The owner of each bin, noisy to clean; ties go to fewer ranges, then to earlier members."""
    count, bins = table.shape
    best: dict[State, tuple[float, int]] = {(m, 1 << m): (table[m, 0], 0) for m in range(count)}
    history: list[dict[State, State]] = []
    for column in range(1, bins):
        reached: dict[State, tuple[float, int]] = {}
        back: dict[State, State] = {}
        for (owner, used), (loss, turns) in sorted(best.items()):
            for other in range(owner if keep_order else 0, count):
                if other != owner and used >> other & 1:
                    continue
                state = (other, used | 1 << other)
                value = (loss + table[other, column], turns + (other != owner))
                if state not in reached or value < reached[state]:
                    reached[state], back[state] = value, (owner, used)
        best = reached
        history.append(back)
    state = min(sorted(best), key=lambda key: best[key])
    total = best[state][0]
    path = [state[0]]
    for back in reversed(history):
        state = back[state]
        path.append(state[0])
    return path[::-1], float(total)


@torch.no_grad()
def losses_per_bin(
    ensemble: Ensemble, batches: Iterable[Batch], edges: Sequence[float], seed: int = 0
) -> np.ndarray:
    """f64 [M, N]: mean squared error of each member's x0 on ``batches``, in the middle of each bin
    of the ensemble's t; all members see the same noisy samples. NaN where a member is missing."""
    at = np.asarray(edges, dtype=np.float64)
    total = np.zeros((len(ensemble.members), len(at) - 1))
    samples = 0
    for number, batch in enumerate(batches):
        samples += len(batch.x)
        for column, middle in enumerate((at[1:] + at[:-1]) / 2):
            eps = torch.randn(batch.x.shape, generator=generator(seed, "bins", number, column))
            t = torch.full((len(batch.x),), float(middle), dtype=batch.x.dtype)
            x = ensemble.process.diffuse(batch.x, eps.to(batch.x), t)
            for member, there in enumerate(ensemble.present.tolist()):
                error = _error(ensemble, member, x, t, batch) if there else float("nan")
                total[member, column] += error
    if not samples:
        raise DataError(describe("batches", 0, "at least one"))
    return total / samples


def _error(ensemble: Ensemble, member: int, x: Tensor, t: Tensor, batch: Batch) -> float:
    """Sum over samples of the mean squared error."""
    answer = ensemble.ask(member, x, t, batch.cond)
    x0 = convert(ensemble.process, answer.value, answer.view, "x0", x, t)
    return float((x0 - batch.x).double().square().flatten(1).mean(1).sum())
