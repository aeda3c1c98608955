"""Randomness is passed in and addressed by name, never taken from the global generator.

``generator(seed, "train", step)`` depends on its arguments alone, so training resumes exactly
without saving generator states, and sample i of a batch depends on its own seed only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor


def derive(seed: int, *stream: int | str) -> int:
    """A 63-bit seed that is a function of ``seed`` and the stream's name."""
    text = "/".join([str(int(seed)), *(str(part) for part in stream)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> Generator:
    return Generator(device=device).manual_seed(derive(seed, *stream))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive(seed, *stream)))


class SampleNoise:
    """Independent noise per sample: row i depends on ``seeds[i]`` alone, never on batch mates."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.device = torch.device(device)
        self._generators = [generator(seed, "sample") for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def index(self, rows: Sequence[int] | Tensor) -> SampleNoise:
        """Of some samples: what one of the two draws, the other does not draw again."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        made = SampleNoise([], self.device)
        made.seeds = [self.seeds[row] for row in chosen]
        made._generators = [self._generators[row] for row in chosen]
        return made

    def joined(self, other: SampleNoise) -> SampleNoise:
        """Of these samples and then of those of ``other``."""
        made = SampleNoise([], self.device)
        made.seeds = [*self.seeds, *other.seeds]
        made._generators = [*self._generators, *other._generators]
        return made

    def normal(self, shape: Sequence[int]) -> Tensor:
        """f32 [B, *shape]. Drawn on the CPU, so equal on every device."""
        rows = [torch.randn(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(rows).to(self.device)

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """f32 [B, *shape] in [0, 1)."""
        rows = [torch.rand(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(rows).to(self.device)
