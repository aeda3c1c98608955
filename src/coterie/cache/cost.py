"""What a cache saves: FLOPs, parameters in memory, and time.

FLOPs are counted from the products that torch executes, routers included. Time is measured too, as
the two are not proportional.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coterie.cache.conditioning_tables import KnownTables
from coterie.cache.denoiser import CachedDenoiser
from coterie.cache.layer import FoldedLayer
from coterie.core.errors import ConfigError, describe
from coterie.experts import ExpertLayer


@dataclass(frozen=True)
class CacheCost:
    """Cost of a denoiser without and with a cache.

    ``flops``: of one call for one sample, mean over the steps, 2 per multiply-add.
    ``flops_all_experts``: if every expert ran, as in plain implementations. ``parameters``: values
    kept in memory.
    """

    flops_all_experts: float
    flops_without: float
    flops_with: float
    parameters_without: int
    parameters_with: int

    @property
    def flops_saved(self) -> float:
        """Share of the FLOPs that is saved, 0..1."""
        return 1.0 - self.flops_with / self.flops_without

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "flops_saved": self.flops_saved}


@torch.no_grad()
def cost(folded: CachedDenoiser) -> CacheCost:
    """Cost of ``folded`` and of its source, by running both for every number of experts that
    occurs.

    ConfigError if the denoiser that ``folded`` was made from no longer exists.
    """
    source = _source(folded)
    steps = range(len(folded.schedule))
    layers = [module for module in folded.modules() if isinstance(module, FoldedLayer)]
    used = [tuple(layer.experts_used(step) for layer in layers) for step in steps]
    total = [0.0, 0.0, 0.0]
    folded(*_call(folded, step=0))  # its tables are not a part of a call
    for numbers, count in Counter(used).items():
        call = _call(folded, step=used.index(numbers))
        with _all_experts(source):
            total[0] += count * count_flops(source, *call)
        total[1] += count * count_flops(source, *call)
        total[2] += count * count_flops(folded, *call)
    every, without, cached = (value / len(used) for value in total)
    return CacheCost(every, without, cached, resident(source), resident(folded))


@contextmanager
def _all_experts(model: nn.Module) -> Iterator[None]:
    """Inside the block no expert is skipped."""
    layers = {m: m.config for m in model.modules() if isinstance(m, ExpertLayer)}
    try:
        for layer, config in layers.items():
            layer.config = config.replace(dispatch="dense")
        yield
    finally:
        for layer, config in layers.items():
            layer.config = config


def resident(model: nn.Module) -> int:
    """Values in a model's parameters and in tensors computed from them; each tensor once."""
    tensors: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, FoldedLayer):
            tensors |= {id(t): t for t in module.fused()}
    tables = getattr(model, "tables", None)
    known = tables.numbers() if isinstance(tables, KnownTables) else 0
    return known + sum(tensor.numel() for tensor in tensors.values())


def count_flops(run: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products, attentions and convolutions that ``run(*args)`` executes."""
    grouped = {torch.ops.aten._grouped_mm: _grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        run(*args)
    return int(counter.get_total_flops())


def _grouped_flops(x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Rows [A, in], each times the matrix [in, out] of its group."""
    return 2 * int(x_shape[0]) * int(x_shape[-1]) * int(w_shape[-1])


@torch.no_grad()
def measure(folded: CachedDenoiser, batch: int = 1, rounds: int = 7) -> dict[str, float]:
    """Milliseconds of one call for ``batch`` samples of one step: ``without_ms``, ``with_ms`` are
    medians, ``ratio`` (with / without) the median of the ratios within a round.

    Both run in turn in every round, the steps of the schedule one after another; the clock is
    process time on one thread of a CPU, else wall time.
    """
    source = _source(folded)
    calls = [_call(folded, step, batch) for step in range(len(folded.schedule))]
    for model in (source, folded):
        model(*calls[0])
    rows = [[_seconds(model, calls) for model in (source, folded)] for _ in range(rounds)]
    each = [1e3 / len(calls) * statistics.median(row[place] for row in rows) for place in (0, 1)]
    ratio = statistics.median(after / before for before, after in rows)
    return {"without_ms": each[0], "with_ms": each[1], "ratio": ratio}


def _seconds(model: nn.Module, calls: list[tuple[Tensor, ...]]) -> float:
    cuda = calls[0][0].is_cuda
    single = torch.get_num_threads() == 1 and not cuda
    clock = time.process_time if single else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    for call in calls:
        model(*call)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def _source(folded: CachedDenoiser) -> nn.Module:
    source = folded.source
    if source is None:
        hint = "it is the measure of what the cache saves"
        raise ConfigError(describe("denoiser", None, "the one that was folded, still held", hint))
    return source


def _call(folded: CachedDenoiser, step: int, batch: int = 1) -> tuple[Any, ...]:
    x, cond = folded.example
    rows = torch.zeros(batch, dtype=torch.long, device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = folded.schedule.times[step].to(device=x.device, dtype=dtype)
    return x[rows], t.expand(batch), cond.index(rows)
