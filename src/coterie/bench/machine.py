"""What this machine can do at best, measured: the limits that figures are held against."""

from __future__ import annotations

import torch

from coterie.bench.timing import Place, interleaved

_BYTES = 128 * 2**20  # far beyond any cache


def read_bandwidth(place: Place, rounds: int = 3) -> float:
    """Bytes per second at which torch sums 128 MiB of float32: the best of the rounds."""
    values = torch.ones(_BYTES // 4, device=place.device)
    with place.entered():
        times = interleaved({"read": values.sum}, place, rounds)["read"]
    return _BYTES / min(times)
