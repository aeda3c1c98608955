"""Check of a conversion: outputs of both models on the same inputs, and the new routers'
choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.convert.config import UpcycleConfig
from coterie.core.batch import Batch
from coterie.core.rng import generator
from coterie.core.routing import Routing

TOLERANCE = 1e-4  # largest relative error of a function that counts as kept


@dataclass(frozen=True)
class Preserved:
    """``max_error``: largest absolute difference of two outputs; ``relative_error``: that over the
    largest output. ``load_cv``: per routing, standard deviation over mean of the copies' loads
    (0 = equal). ``whole_copies``: share of rows whose choice is whole copies."""

    max_error: float
    relative_error: float
    load_cv: tuple[float, ...] = ()
    whole_copies: float = 1.0

    @property
    def holds(self) -> bool:
        return self.relative_error <= TOLERANCE


def compare(
    before: Tensor, after: Tensor, routings: Sequence[Routing] = (), slices: int = 1
) -> Preserved:
    """Two outputs for the same input, and the routings behind the second."""
    error = float((before.double() - after.double()).abs().max())
    largest = float(before.double().abs().max())
    whole = [float(_whole(routing, slices).float().mean()) for routing in routings]
    return Preserved(
        max_error=error,
        relative_error=error / largest if largest else error,
        load_cv=tuple(copy_load_cv(routing, slices) for routing in routings),
        whole_copies=sum(whole) / len(whole) if whole else 1.0,
    )


def check_preserved(dense: Any, upcycled: Any, batch: Batch, config: UpcycleConfig) -> Preserved:
    """Compare two models of the library on ``batch``, noised at levels spread evenly over it."""
    with torch.no_grad(), _evaluating(dense), _evaluating(upcycled):
        x, t = _inputs(dense, batch)
        before = dense(x, t, batch.cond)
        after = upcycled(x, t, batch.cond)
    old = {(routing.slot, routing.layer) for routing in before.routings}
    new = [routing for routing in after.routings if (routing.slot, routing.layer) not in old]
    return compare(before.value, after.value, new, config.slices)


def copy_load_cv(routing: Routing, slices: int) -> float:
    """Standard deviation over mean of how often each copy is chosen."""
    load = routing.counts().unflatten(0, (-1, slices)).sum(dim=1)
    return float(load.std(correction=0) / load.mean()) if float(load.sum()) else 0.0


def _whole(routing: Routing, slices: int) -> Tensor:
    """bool [R]: each copy has all of its slices chosen or none."""
    chosen = routing.one_hot().unflatten(1, (-1, slices)).sum(dim=2)
    return ((chosen == 0) | (chosen == slices)).all(dim=1)


def _inputs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(x_t, t) for a denoiser of continuous data; the tokens themselves for one of text."""
    process = getattr(model, "process", None)
    size = len(batch.ids)
    if process is None:
        return batch.x, torch.zeros(size, device=batch.x.device)
    t = process.time_of_unit((torch.arange(size) + 0.5) / size).to(batch.x.device)
    eps = torch.randn(batch.x.shape, generator=generator(0, "check_preserved")).to(batch.x)
    return process.diffuse(batch.x, eps, t), t


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
