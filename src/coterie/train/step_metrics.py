"""The metrics of a step for ``metrics.jsonl``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.core.batch import Losses
from coterie.core.routing import Routing, loads


class NoiseBins:
    """Mean unweighted loss per noise-level bin since the last log; saved in checkpoints."""

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.sums = torch.zeros(num_bins, dtype=torch.float64)
        self.counts = torch.zeros(num_bins, dtype=torch.float64)

    def add(self, noise: Tensor, per_sample: Tensor) -> None:
        """noise [B] in [0, 1], per_sample [B]."""
        bins = (noise.float() * self.num_bins).long().clamp(0, self.num_bins - 1)
        # A product, not a scatter: the order of summation is fixed on every device.
        member = torch.nn.functional.one_hot(bins, self.num_bins).double()
        self.sums = self.sums.to(member.device) + per_sample.double() @ member
        self.counts = self.counts.to(member.device) + member.sum(0)

    def means(self) -> list[float | None]:
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]

    def reset(self) -> None:
        self.load([[0.0] * self.num_bins] * 2)

    def dump(self) -> list[list[float]]:
        return [self.sums.tolist(), self.counts.tolist()]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        self.sums = torch.tensor(state[0], dtype=torch.float64)
        self.counts = torch.tensor(state[1], dtype=torch.float64)


def average(losses: Iterable[Losses]) -> dict[str, dict[str, float]]:
    """Mean over micro-batches: main losses by name, unscaled aux losses by name and layer."""
    sums: dict[str, dict[str, list[float]]] = {"losses": {}, "aux": {}}
    for item in losses:
        for name, value in item.main.items():
            sums["losses"].setdefault(name, []).append(float(value))
        for aux in item.aux:
            sums["aux"].setdefault(aux.key, []).append(float(aux.value))
    return {
        group: {name: sum(values) / len(values) for name, values in entries.items()}
        for group, entries in sums.items()
    }


def expert_load(routings: Iterable[Routing]) -> dict[str, dict[str, float]]:
    """Per router: largest load relative to the mean, and the number of unused experts in
    this step."""
    counts: dict[str, Tensor] = {}
    made = list(routings)
    for routing, (own, _) in zip(made, loads(made)):
        key = f"{routing.slot}/layer{routing.layer}"
        key += f"/round{routing.round}" if routing.round else ""
        counts[key] = counts[key] + own if key in counts else own
    out = {}
    for key, load in counts.items():
        mean = float(load.mean())
        out[key] = {
            "experts": load.numel(),
            "max_load": float(load.max()) / mean if mean else 0.0,
            "dead": int((load == 0).sum()),
        }
    return out


def memory_mb(device: torch.device) -> float:
    """Peak memory of the device in use (for the CPU: of this process); 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # POSIX only
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def scalars(record: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Numbers of a nested record as ``a/b`` -> value, for TensorBoard."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)
