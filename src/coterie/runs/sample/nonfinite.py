"""Finding the step and module in which a sample became non-finite, by drawing it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from coterie.core.errors import DataError
from coterie.core.prediction import Prediction
from coterie.solvers import Callback, NonFiniteSamples
from coterie.train.nonfinite import finite


class _Found(Exception):
    """Enough has been drawn."""


def explained(
    error: DataError, draw: Callable[[Callback], Any], model: nn.Module, first: int = 0
) -> DataError:
    """``error`` of a batch whose samples are numbered from ``first``, with the step and the first
    module that answered with NaN or infinity; ``draw`` draws the same samples again. ``error``
    itself where nothing of that kind is met."""
    place: dict[str, Any] = {"step": 0, "t": None}
    found: list[str] = []

    def callback(step: int, t: float, x: Tensor, prediction: Prediction) -> None:
        place.update(step=step, t=t)
        if not finite((x, prediction.value)):
            raise _Found
        place.update(step=step + 1, t=None)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not finite(output):
            # A module that was told NaN is not where it began.
            found.extend([names[module]] if finite(inputs) else [])
            raise _Found

    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    handles = [module.register_forward_hook(hook) for module in names]
    try:
        draw(callback)
    except _Found:
        pass
    except DataError:
        return error
    else:
        return error
    finally:
        for handle in handles:
            handle.remove()
    rows = [first + row for row in error.rows] if isinstance(error, NonFiniteSamples) else None
    who = "samples" if rows is None else f"samples {rows[:8]}"
    at = "" if place["t"] is None else f", t = {place['t']:.4g}"
    by = f"module {found[0]}" if found else "guidance or the solver, from finite answers"
    powers = "betas of the composition" if hasattr(model, "betas") else "guidance weight"
    hint = f"look at the weights and at the {powers}"
    return DataError(f"{who}: NaN or infinity in step {place['step']}{at}, first of {by}: {hint}")
