"""The order of samples in training, a function of seed and position alone.

Resuming at sample p, or reading with another batch size or number of workers, gives the same
stream.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from coterie.core.errors import ConfigError, describe
from coterie.core.rng import derive


def order(seed: int, position: int, count: int, size: int) -> np.ndarray:
    """Dataset indices i64 [count] of samples ``position .. position+count-1`` of the stream.

    The stream is one epoch after another, each a fresh permutation of ``range(size)``.
    """
    for field, value, least in (("size", size, 1), ("position", position, 0), ("count", count, 0)):
        if value < least:
            raise ConfigError(describe(f"order.{field}", value, f"an integer >= {least}"))
    pieces = []
    while count > 0:
        epoch, start = divmod(position, size)
        take = min(count, size - start)
        pieces.append(_epoch(seed, epoch, size)[start : start + take])
        position, count = position + take, count - take
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    rows = permutation(seed, ("order", epoch), size)
    rows.setflags(write=False)  # the memo is shared between callers
    return rows


def permutation(seed: int, stream: tuple[int | str, ...], size: int) -> np.ndarray:
    """Uniform permutation i64 [size], a function of its arguments alone.

    Sorts raw Philox words rather than calling ``Generator.permutation``, whose algorithm NumPy
    may change between versions: a resumed run and a fixed split must not change with it.
    """
    words = np.random.Philox(key=derive(seed, *stream)).random_raw(size)
    return np.argsort(words, kind="stable")
