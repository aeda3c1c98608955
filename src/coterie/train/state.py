"""The state of training as named tensors: model, objective, optimiser and averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from coterie.core.errors import CheckpointError, describe
from coterie.core.tensors import assign, local, module_tensors, require_finite
from coterie.train import checkpoint
from coterie.train.averages import Ema
from coterie.train.checkpoint import Checkpoint
from coterie.train.optimizer import load_optimizer, optimizer_tensors
from coterie.train.run_directory import stored_hash


def objective_tensors(objective: Any, model: nn.Module) -> dict[str, Tensor]:
    """Tensors that an objective trains or updates, without frozen teachers and the model."""
    if not isinstance(objective, nn.Module):
        return {}
    shared = {id(value) for value in module_tensors(model).values()}
    frozen = {
        id(value)
        for module in objective.modules()
        if not any(p.requires_grad for p in module.parameters())
        and any(True for _ in module.parameters())
        for value in module_tensors(module).values()
    }
    return {
        name: value
        for name, value in module_tensors(objective).items()
        if id(value) not in shared and id(value) not in frozen
    }


@dataclass(frozen=True, eq=False)
class Parts:
    """The objects whose state a checkpoint holds."""

    model: nn.Module
    objective: Any
    optimizer: Optimizer
    parameters: Mapping[str, nn.Parameter]
    ema: Ema


def ema_group(decays: Sequence[float], decay: float) -> str:
    """Name of an average's group: "ema" for the first decay, "ema-<decay>" for others."""
    return "ema" if decay == decays[0] else f"ema-{decay}"


def capture(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """Groups of live tensors (not copies) in the layout of a checkpoint."""
    state = {
        "model": {name: local(value) for name, value in module_tensors(parts.model).items()},
        "optimizer": optimizer_tensors(parts.optimizer, parts.parameters),
    }
    own = objective_tensors(parts.objective, parts.model)
    if own:
        state["objective"] = own
    for decay in parts.ema.decays:
        state[ema_group(parts.ema.decays, decay)] = parts.ema.tensors(decay)
    return state


def restore(
    parts: Parts, state: Mapping[str, Mapping[str, Tensor]], ema_updates: int, origin: str
) -> None:
    """Inverse of :func:`capture`; CheckpointError, with the tensor's name, for a mismatch."""
    own = objective_tensors(parts.objective, parts.model)
    decays = parts.ema.decays
    expected = {"model", "optimizer", *(ema_group(decays, decay) for decay in decays)}
    expected |= {"objective"} if own else set()
    if set(state) != expected:
        raise CheckpointError(f"{origin}: holds {sorted(state)}, expected {sorted(expected)}")
    held = {name: local(value) for name, value in module_tensors(parts.model).items()}
    assign(held, state["model"], f"{origin}: model")
    load_optimizer(parts.optimizer, parts.parameters, state["optimizer"])
    if own:
        assign(own, state["objective"], f"{origin}: objective")
    for decay in decays:
        parts.ema.load(decay, state[ema_group(decays, decay)], ema_updates)


def load_weights(run_dir: str | Path, model: nn.Module, weights: str = "ema") -> Checkpoint:
    """Load a run's newest weights into ``model``: "ema" (first decay), "ema-<decay>" or "model".

    "ema" falls back to the plain weights of a run without averages. CheckpointError if
    ``config.json`` is not that of the checkpoint.
    """
    found = checkpoint.load_latest(run_dir, stored_hash(run_dir))
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint yet; train the run first")
    path = found.path
    if weights == "ema" and "ema" not in found.state:
        weights = "model"
    allowed = [name for name in found.state if name == "model" or name.startswith("ema")]
    if weights not in allowed:
        raise CheckpointError(describe("weights", weights, ", ".join(sorted(allowed))))
    own = module_tensors(model)
    for part in {"model", weights}:
        require_finite(found.state[part], f"{path}: {part}")
    assign(own, found.state["model"], f"{path}: model")
    # Shadows are float32 and cover what was trained: cast them, and leave the rest as loaded.
    chosen = {
        name: value.to(own[name].dtype) if name in own else value
        for name, value in found.state[weights].items()
    }
    assign({name: own[name] for name in own if name in chosen}, chosen, f"{path}: {weights}")
    return found
