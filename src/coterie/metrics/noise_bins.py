"""Loss per noise level: a cheap and sensitive metric of a denoiser."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from coterie.core.errors import ConfigError, DataError, describe


class Bin(NamedTuple):
    low: float
    high: float
    num_samples: int
    mean: float | None  # None where nothing fell into the bin
    stderr: float | None  # None below two samples


class NoiseBins:
    """Running mean of per-sample losses in ``num_bins`` equal bins of the noise level [0, 1]."""

    def __init__(self, num_bins: int = 10) -> None:
        if num_bins < 1:
            raise ConfigError(describe("num_bins", num_bins, "an integer >= 1"))
        self.num_bins = num_bins
        self._count = np.zeros(num_bins, dtype=np.int64)
        self._sum = np.zeros(num_bins)
        self._squares = np.zeros(num_bins)

    def add(self, per_sample: Any, noise: Any) -> None:
        """Losses [B] and the noise levels [B] at which they were measured (arrays or tensors)."""
        losses = np.asarray(per_sample, dtype=np.float64)
        levels = np.asarray(noise, dtype=np.float64)
        if losses.ndim != 1 or losses.shape != levels.shape:
            found = f"{losses.shape} and {levels.shape}"
            raise DataError(describe("shapes of per_sample and noise", found, "[B] and [B]"))
        if not np.isfinite(losses).all():
            raise DataError("per_sample: holds NaN or infinity")
        if losses.size and not (levels.min() >= 0 and levels.max() <= 1):
            raise DataError(describe("noise", f"{levels.min()}..{levels.max()}", "0..1"))
        where = np.minimum((levels * self.num_bins).astype(np.int64), self.num_bins - 1)
        self._count += np.bincount(where, minlength=self.num_bins)
        self._sum += np.bincount(where, losses, minlength=self.num_bins)
        self._squares += np.bincount(where, losses**2, minlength=self.num_bins)

    def result(self) -> list[Bin]:
        """One record per bin, in order of the noise level."""
        edges = np.linspace(0.0, 1.0, self.num_bins + 1)
        return [self._bin(i, float(edges[i]), float(edges[i + 1])) for i in range(self.num_bins)]

    def _bin(self, index: int, low: float, high: float) -> Bin:
        count = int(self._count[index])
        if count == 0:
            return Bin(low, high, 0, None, None)
        mean = float(self._sum[index] / count)
        if count == 1:
            return Bin(low, high, 1, mean, None)
        variance = max(float(self._squares[index]) / count - mean**2, 0.0) * count / (count - 1)
        return Bin(low, high, count, mean, (variance / count) ** 0.5)
