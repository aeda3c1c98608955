"""Finding the module or parameter in which a NaN or infinity first appeared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.batch import Batch
from coterie.core.errors import DataError
from coterie.core.routing import Routing


class _Found(Exception):
    """Enough of the forward has run."""


def check_batch(batch: Batch, source: str) -> None:
    """DataError, naming the samples, if the data are not finite."""
    for name, value in {"x": batch.x, **batch.cond.tensors()}.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            rows = (
                ~torch.isfinite(value).flatten(1).all(1) if value.dim() > 1 else ~value.isfinite()
            )
            ids = batch.ids[rows.to(batch.ids.device)].tolist()
            raise DataError(f"{source}: {name} is not finite in samples {ids[:8]}")


def first_nonfinite(model: nn.Module, forward: Callable[[], Any], stop: bool = True) -> str | None:
    """Name of the first module that returns NaN or infinity when ``forward`` runs again.

    ``stop`` False: the forward pass continues, as other processes wait for its end.
    """
    handles = []
    seen: list[str] = []
    for name, module in model.named_modules():
        label = name or type(model).__name__

        def hook(_module: Any, _inputs: Any, output: Any, label: str = label) -> None:
            if not seen and not finite(output):
                seen.append(label)
                if stop:
                    raise _Found

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            forward()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None


def last_bad_gradient(parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The last parameter with a non-finite gradient, which the backward pass reaches first."""
    for name, parameter in reversed(list(parameters.items())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return None


def finite(value: Any) -> bool:
    """Whether all numbers in nested tensors, containers and records are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Routing):
        # A router may mask raw logits with -inf; what leaves it must be finite.
        return finite(value.gates) and finite(value.probs)
    if isinstance(value, Mapping):
        return all(finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(finite(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(finite(getattr(value, item.name)) for item in dataclasses.fields(value))
    return True
