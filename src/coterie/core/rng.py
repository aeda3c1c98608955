"""Random numbers: seeds derived from names, never torch's global generator.

``generator(seed, "train", step)`` depends on its arguments alone. So training resumes exactly
without saved generator states, and sample i of a batch depends on its own seed only.
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
    """A 63-bit seed, computed from ``seed`` and the name of the stream."""
    text = "/".join([str(int(seed)), *(str(part) for part in stream)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> Generator:
    """A torch generator for the stream of that name."""
    return Generator(device=device).manual_seed(derive(seed, *stream))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    """A numpy generator for the stream of that name."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *stream)))


class PassSeed:
    """Seed of the random numbers of one forward pass; taken from ``rng`` at the first call.

    Each expert layer draws from its own generator, derived from this seed and the layer's place
    (``Context.drawing``), so that gradient checkpointing, which runs the layer again, draws the
    same numbers.
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
    """Independent noise per sample: row i depends on ``seeds[i]`` alone, not on the other rows."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.device = torch.device(device)
        self._generators = [generator(seed, "sample") for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def index(self, rows: Sequence[int] | Tensor) -> SampleNoise:
        """The noise of some samples. Generators are shared: numbers drawn here are not
        drawn again."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        made = SampleNoise([], self.device)
        made.seeds = [self.seeds[row] for row in chosen]
        made._generators = [self._generators[row] for row in chosen]
        return made

    def joined(self, other: SampleNoise) -> SampleNoise:
        """The noise of these samples, then of those of ``other``."""
        made = SampleNoise([], self.device)
        made.seeds = [*self.seeds, *other.seeds]
        made._generators = [*self._generators, *other._generators]
        return made

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal f32 [B, *shape]. Drawn on the CPU, so equal on every device."""
        rows = [torch.randn(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(rows).to(self.device)

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """Uniform f32 [B, *shape] in [0, 1). Drawn on the CPU."""
        rows = [torch.rand(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(rows).to(self.device)
