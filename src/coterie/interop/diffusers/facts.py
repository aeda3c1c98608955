"""What a model of diffusers says of itself: its arguments, its time embedding, its classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.context import NULL_LABEL, Context
from coterie.core.errors import DataError, describe
from coterie.interop.diffusers.conventions import convention_or_plain

TIME_MODULES = ("time_embedding", "timestep_embedder")
"""Names of the network behind ``time_proj``, in U-Nets and in transformers."""


def time_network(model: nn.Module) -> tuple[Any, Any] | None:
    """(sinusoid, network) that make the time embedding; None where a model has no such thing."""
    for module in model.modules():
        for name in TIME_MODULES:
            if hasattr(module, "time_proj") and hasattr(module, name):
                return module.time_proj, getattr(module, name)
    return None


def time_width(model: nn.Module) -> int | None:
    """Size of the time embedding."""
    found = time_network(model)
    return None if found is None else int(found[1].linear_2.out_features)


def embed_time(model: nn.Module, steps: int) -> Callable[[Tensor], Tensor]:
    """Time [B] of the model's grid of so many steps -> tau [B, D], timestep only, as the model
    itself makes it of what it is told then."""
    found = time_network(model)
    assert found is not None
    sinusoid, network = found
    how = convention_or_plain(model)

    def embed(time: Tensor) -> Tensor:
        fed = how.time(model, time, steps) * how.embeds
        tau: Tensor = network(sinusoid(fed).to(network.linear_1.weight.dtype))
        return tau

    return embed


def read_call(
    model: nn.Module, args: Any, kwargs: Any, num_steps: int, null_label: int | None
) -> Context:
    """The context of a call of the model itself, read off its arguments.

    ``num_steps``: length of the grid that timesteps count. ``null_label``: the class number that
    stands for no condition.
    """
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    x: Tensor = next(iter(given.values()))
    time = torch.as_tensor(given.get("timestep", 0.0), device=x.device).float()
    if time.dim() > 1 or time.shape not in ((), (1,), x.shape[:1]):
        raise DataError(describe("timestep", tuple(time.shape), f"() or [{x.shape[0]}]"))
    time = convention_or_plain(model).grid(model, time.expand(x.shape[0]), num_steps)
    label = given.get("class_labels")
    if label is not None and label.is_floating_point():
        label = None  # a vector, not a class
    if label is not None and null_label is not None:
        label = torch.where(label == null_label, NULL_LABEL, label)
    has_time = time_network(model) is not None
    return Context(
        batch=x.shape[0],
        tokens=0,
        noise=(time / num_steps).clamp(0.0, 1.0),
        step_index=time.round().long().clamp(0, num_steps - 1),
        num_steps=num_steps,
        time_input=time,
        time_embedding=embed_time(model, num_steps)(time) if has_time else None,
        label=label,
        training=model.training,
    )
