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

from coterie.core.errors import DataError
from coterie.core.tensors import backward_runs


def derive(seed: int, *stream: int | str) -> int:
    """A 63-bit seed that is a function of ``seed`` and the stream's name."""
    text = "/".join([str(int(seed)), *(str(part) for part in stream)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> Generator:
    return Generator(device=device).manual_seed(derive(seed, *stream))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive(seed, *stream)))


class PassSeed:
    """``seed()``: of what one forward pass of a model draws; taken from ``rng`` when first asked.

    Each place of the pass draws from a generator of its own, made of this seed and of where it is
    (``Context.drawing``): what gradient checkpointing runs again draws the same.
    """

    def __init__(self, rng: Generator) -> None:
        self._rng = rng
        self._seed: int | None = None

    def __call__(self) -> int:
        if self._seed is None:
            if backward_runs():
                hint = "checkpoint parts of the network, not the whole model with its rng"
                raise DataError(f"rng: a pass that is run again cannot draw what it drew; {hint}")
            drawn = torch.randint(2**62, (), generator=self._rng, device=self._rng.device)
            self._seed = int(drawn)
        return self._seed


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
