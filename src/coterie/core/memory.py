"""The least memory that a configuration needs, computed from shapes before anything is allocated.

Counts weights, optimiser and averages, and the least that a batch holds. It is a lower limit: what
it refuses cannot run here; what passes may still need too much (``--dry-run`` and
:mod:`coterie.runs.memory` estimate more closely).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe

SHOWN = 3  # largest numbers that an error names
TOO_LARGE = ("overflow", "out of range", "size calculation", "too large", "too big", "exceed")
"""What torch says of a tensor that cannot be."""
MACHINE = "what this machine has"
LEAST = 1024  # smaller ones are not what makes a model large


def memory_bytes() -> int:
    """Bytes of main memory of this machine, or of its largest GPU where that has more."""
    try:
        own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63  # a system that does not say refuses by itself
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return max([own, *(torch.cuda.get_device_properties(n).total_memory for n in gpus)])


def on_meta(
    config: Any, build: Callable[[], Any], limit: int | None = None, whose: str = MACHINE
) -> nn.Module:
    """Build a model on the meta device: shapes without memory.

    ConfigError if a tensor is too large to exist, or if the weights take more than ``limit`` bytes;
    ``whose`` says in the message where the limit comes from.
    """
    total = 0

    def count(_module: nn.Module, _name: str, value: nn.Parameter) -> None:
        nonlocal total
        total += value.nbytes if value is not None else 0
        if limit is not None and total > limit:
            raise ConfigError(_too_much(config, total, limit, "its weights alone", whose))

    watched = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            made: nn.Module = build()
            return made
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:
        said = str(error).partition("\n")[0]
        if not any(word in said.lower() for word in TOO_LARGE):
            raise
        raise ConfigError(
            describe("model", largest(config), "sizes of which tensors can be made", said)
        ) from None
    finally:
        watched.remove()


def check_memory(
    config: Any,
    model: nn.Module,
    train: Any = None,
    batch: int = 0,
    parts: int = 1,
    limit: int | None = None,
) -> int:
    """Bytes that ``model`` (on any device) needs; ConfigError if this machine has less memory.

    ``train``: a TrainConfig, to count optimiser and averages; ``batch``: samples in memory at once;
    ``parts``: number of processes among which the model may be split.
    """
    weights = sum(value.nbytes for value in chain(model.parameters(), model.buffers()))
    copies = 1 + (3 + len(train.ema) if train is not None else 0)  # gradient, two moments, averages
    kept = batch * sample_bytes(config)
    needed, there = (weights * copies + kept) // parts, memory_bytes() if limit is None else limit
    if needed > there:
        what = f"weights {size(weights)}, with what training keeps {size(weights * copies)}"
        what += f", a batch at least {size(kept)}" if kept else ""
        raise ConfigError(_too_much(config, needed, there, what))
    return needed


def _too_much(config: Any, needed: int, there: int, what: str, whose: str = MACHINE) -> str:
    allowed = f"allowed: {size(there)}, {whose}"
    return f"model: {size(needed)} are needed; {allowed}; {what}; the largest: {largest(config)}"


def sample_bytes(config: Any) -> int:
    """The least bytes that one sample takes in a forward pass: its values and its tokens."""
    backbone = getattr(config, "backbone", None)
    shape = getattr(backbone, "sample_shape", None) or ()
    width = getattr(getattr(backbone, "trunk", None), "width", 0)
    return 4 * (math.prod(shape) + int(getattr(backbone, "tokens", 0) or 0) * width)


def largest(config: Any) -> str:
    """The fields of a configuration with the largest numbers, by path, for an error message."""
    data = config.model_dump(mode="json") if isinstance(config, Config) else config
    found = sorted(_numbers(data, ""), key=lambda item: -item[1])
    named = [f"{path} {value:.10g}" for path, value in found if value >= LEAST][:SHOWN]
    return ", ".join(named or [f"{path} {value:.10g}" for path, value in found[:SHOWN]])


def size(count: int) -> str:
    """A number of bytes as text with a unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _numbers(data: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            if key != "seed":
                yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list | tuple):
        for number, value in enumerate(data):
            yield from _numbers(value, f"{path}.{number}")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, data
