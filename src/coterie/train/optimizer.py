"""The optimiser, its parameter groups, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.tensors import is_borrowed
from coterie.train.config import TrainConfig


def decayed(model: nn.Module) -> set[int]:
    """Ids of the parameters with weight decay: those of two or more dimensions.

    The leading E of expert stacks does not count, so their biases are not decayed. A parameter with
    the attribute ``use_decay = False`` is not decayed.
    """
    stacked = {
        id(parameter)
        for module in model.modules()
        if hasattr(module, "expert_state")
        for parameter in module.parameters(recurse=False)
    }
    return {
        id(parameter)
        for parameter in model.parameters()
        if getattr(parameter, "use_decay", parameter.dim() - (id(parameter) in stacked) >= 2)
    }


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """Exclude modules from training, by shell patterns of their names (``*`` also matches dots).

    ConfigError for a pattern that matches none. Borrowed modules are excluded too, but not adapters
    inside them. Returns every excluded module; the loop sets them to eval mode.
    """
    found: list[nn.Module] = []
    for pattern in patterns:
        named = [module for name, module in model.named_modules() if fnmatchcase(name, pattern)]
        if not named:
            allowed = "patterns of module names, such as *.routers.*"
            raise ConfigError(
                describe("train.freeze", pattern, allowed, "no module has such a name")
            )
        found += named
    for module in found:
        module.requires_grad_(False)
    inside = [module for outer in found for module in outer.modules()]
    for module in inside:
        module.is_frozen = True  # type: ignore[assignment]
    return inside + [module for module in model.modules() if is_borrowed(module)]


def trainable(model: nn.Module, objective: Any) -> dict[str, nn.Parameter]:
    """All trained parameters by name: ``model.<name>``, then ``objective.<name>``."""
    out: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    owners = [("model", model)]
    if isinstance(objective, nn.Module):
        owners.append(("objective", objective))
    for prefix, owner in owners:
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                out[f"{prefix}.{name}"] = parameter
    return out


def build_optimizer(
    config: TrainConfig,
    model: nn.Module,
    objective: Any,
    parameters: Mapping[str, nn.Parameter],
) -> Optimizer:
    """AdamW in three groups: decayed, not decayed, and the objective's own parameters.

    The objective's group uses ``objective.lr`` if it has one and is never decayed. Every group has
    ``scale``: its learning rate as a multiple of the scheduled one.
    """
    heavy = decayed(model)
    main = [p for name, p in parameters.items() if name.startswith("model.")]
    own = [p for name, p in parameters.items() if name.startswith("objective.")]
    scale = float(getattr(objective, "lr", None) or config.lr) / config.lr
    groups = [
        {"params": [p for p in main if id(p) in heavy], "weight_decay": config.weight_decay},
        {"params": [p for p in main if id(p) not in heavy], "weight_decay": 0.0},
        {"params": own, "weight_decay": 0.0, "scale": scale},
    ]
    groups = [{"scale": 1.0, **group} for group in groups if group["params"]]
    if not groups:
        raise ConfigError("model: no trainable parameters; every one is frozen")
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Total norm of all gradients, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def optimizer_tensors(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state as ``<field>/<parameter>`` -> tensor."""
    out = {}
    for name, parameter in parameters.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            out[f"{field}/{name}"] = value
    return out


def load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`; parameters never stepped have no state."""
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, value in values.items():
        field, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"optimizer: unknown tensor {key}")
        parameter = parameters[name]
        if field != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"optimizer: {key} is {list(value.shape)}, expected {list(parameter.shape)}"
            )
        # A copy: the file may be memory-mapped, and updates happen in place.
        state.setdefault(parameter, {})[field] = value.to(parameter.device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(state)  # type: ignore[arg-type]
