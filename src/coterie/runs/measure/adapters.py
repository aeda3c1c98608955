"""How much the adapters of a run disturb each other, on data of the concept of each.

An adapter that trains one row of a table of labels was made for that class; others are looked at on
all held-out data. Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.adapters import LowRank, adapters_of, pairs, weigh, weights_of
from coterie.adapters.attach import additions_of
from coterie.core.batch import Batch
from coterie.core.rng import generator
from coterie.runs.build import build_source
from coterie.runs.judges import judge_of
from coterie.runs.judges.base import batches
from coterie.runs.judges.noise import MIDDLE, NoiseJudge
from coterie.runs.trained_run import LoadedRun

LOOKED_AT = 128  # held-out samples per adapter


def adapter_measures(run: LoadedRun) -> dict[str, float]:
    """{} for runs with fewer than two adapters. Means over adapters or pairs:

    ``adapter_overlap`` |A_i A_j^T| / (|A_i| |A_j|) and ``update_overlap`` |dW_i dW_j^T| / (|dW_i|
    |dW_j|), over modules; ``crosstalk``: |sum_{j != i} dW_j x| / |dW_i x| on what the modules read
    with adapter i alone; ``adapter_drift``: how far adding the others moves the prediction, as a
    share of how far adapter i had moved it.
    """
    adapters, judge = adapters_of(run.model), judge_of(run)
    init = run.config.init
    if init is None or not init.adapters:  # experts of a guide take turns; they are not added up
        return {}
    if len(adapters) < 2 or not isinstance(judge, NoiseJudge):
        return {}
    found = pairs(adapters)
    weights = weights_of(run.model)
    looked = [_look(run, judge, name, weights) for name in adapters]
    return {
        "adapter_overlap": float(np.mean([pair.overlap for pair in found])),
        "update_overlap": float(np.mean([pair.update_overlap for pair in found])),
        "crosstalk": float(np.mean([crosstalk for crosstalk, _ in looked])),
        "adapter_drift": float(np.mean([drift for _, drift in looked])),
    }


@torch.no_grad()
def _look(
    run: LoadedRun, judge: NoiseJudge, name: str, weights: dict[str, Any]
) -> tuple[float, float]:
    batch = _concept(run, name)

    def ask() -> Tensor:
        value: Tensor = judge.at(batch, MIDDLE, generator(0, "adapter"))[1].value
        return value

    model, off = run.model, dict.fromkeys(weights, 0.0)
    together = ask()
    with weighed(model, off, weights):
        plain = ask()
    with (
        weighed(model, {**off, name: weights[name]}, weights),
        _listening(model, name, weights) as m,
    ):
        alone = ask()
    moved = float((alone - plain).norm())
    return float(np.mean(m)), float((together - alone).norm()) / max(moved, 1e-12)


def _concept(run: LoadedRun, name: str) -> Batch:
    """Held-out samples of the class that an adapter was made for, if there are any."""
    source = build_source(run.config, "held_out")
    batch = batches(source, len(source), len(source))[0]
    rows = next(iter(adapters_of(run.model)[name].values())).config.rows
    label = batch.cond.label
    chosen = torch.arange(len(batch.ids))
    if len(rows) == 1 and label is not None and bool((label == rows[0]).any()):
        chosen = (label == rows[0]).nonzero()[:, 0]
    chosen = chosen[:LOOKED_AT]
    return Batch(batch.x[chosen], batch.cond.index(chosen), batch.ids[chosen])


@contextmanager
def weighed(model: nn.Module, now: dict[str, Any], after: dict[str, Any]) -> Iterator[None]:
    """Weights ``now`` inside the block, ``after`` it those of before."""
    weigh(model, now)
    try:
        yield
    finally:
        weigh(model, after)


@contextmanager
def _listening(model: nn.Module, name: str, weights: dict[str, Any]) -> Iterator[list[float]]:
    """Inside the block: for each adapted module that is called, what the others would add, as a
    share of what adapter ``name`` adds."""
    shares: list[float] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        additions: Any = layer.adapters
        parts = {n: p for n, p in additions.parts.items() if isinstance(p, LowRank)}
        if name not in parts:
            return
        own = weights[name] * parts.pop(name)(layer, args[0], output)
        others = sum(
            (weights[n] * part(layer, args[0], output) for n, part in parts.items()), own * 0
        )
        shares.append(float(others.norm() / own.norm().clamp_min(1e-12)))

    with ExitStack() as stack:
        for layer, _ in additions_of(model).values():
            stack.callback(layer.register_forward_hook(note).remove)
        yield shares
