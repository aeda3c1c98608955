"""What a configuration costs, without paying for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.runs.config import RunConfig

BYTES_PER_PARAMETER = 20  # float32: weight, gradient, two moments of Adam, one running average


def size_of(config: RunConfig) -> dict[str, Any]:
    """Parameters and FLOPs, without allocating a weight: published sizes fit few machines."""
    from coterie.runs.cost import plan

    size = plan(config, measure=False)
    if "parameters_total" not in size:  # a run that trains nothing
        return size
    gib = BYTES_PER_PARAMETER * size["parameters_total"] / 2**30
    return {**size, "training_memory_gib": round(gib, 2)}


def projection(config: RunConfig) -> dict[str, Any]:
    """:func:`size_of` and the minutes that training takes here, by running a few steps.

    ``projected_minutes`` is None, with the reason as ``note``, where the model does not fit the
    memory of this machine or the data are not there.
    """
    from coterie.core.errors import DataError
    from coterie.core.machine import hardware
    from coterie.runs.cost import plan

    size = size_of(config)
    if "parameters_total" not in size:
        return {**size, "projected_minutes": 0.0}
    here = hardware()["memory_gib"]
    if here is not None and size["training_memory_gib"] > here:
        return {**size, "projected_minutes": None, "note": f"this machine has {here} GiB"}
    try:
        return {**size, "projected_minutes": plan(config)["projected_minutes"]}
    except DataError as error:
        return {**size, "projected_minutes": None, "note": str(error)}
