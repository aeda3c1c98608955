"""The share of a network that an adapter changes, and whether a forward pass uses it.

An adapter on modules that no forward pass runs would train nothing without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from coterie.adapters.config import LoraConfig
from coterie.adapters.layers import Additions, additions_of
from coterie.adapters.stacks import Stacks, stacked
from coterie.core.errors import ConfigError, describe


def share(modules: Mapping[str, nn.Module], parts: Mapping[str, nn.Module]) -> float:
    """Share of the network's own parameters in modules that the adapter changes.

    ``modules``: the network's, by path; ``parts``: the adapter's, by the path of their module.
    """
    reached = total = 0
    seen: set[int] = set()
    for path, module in modules.items():
        part = parts.get(path)
        for name, value in module.named_parameters(recurse=False):
            if id(value) in seen:
                continue
            seen.add(id(value))
            total += value.numel()
            inside = part is not None and (not isinstance(part, Stacks) or name in part.names)
            reached += value.numel() * inside
    return reached / max(1, total)


def left_out(
    name: str, config: LoraConfig, modules: Mapping[str, nn.Module], parts: Mapping[str, nn.Module]
) -> str:
    """One line if ``targets`` match stacked experts that the adapter leaves out, with the share of
    parameters that it changes; "" if nothing is left out."""
    missed = []
    for path, module in modules.items():
        part = parts.get(path)
        taken = getattr(part, "names", ()) if isinstance(part, Stacks) else stacked(module)
        if part is not None and not isinstance(part, Stacks):
            continue
        for own in stacked(module):
            covered = any(fnmatchcase(f"{path}.{own}", pattern) for pattern in config.targets)
            if covered and (part is None or own not in taken):
                missed.append(f"{path}.{own}")
    if not missed:
        return ""
    more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
    return (
        f"adapter {name}: targets are modules, and experts are stacked parameters: {missed[0]}"
        f"{more} stay as they are; it reaches {share(modules, parts):.1%} of the network's "
        "parameters; experts=('*',) adapts them too"
    )


def await_reach(model: nn.Module, name: str) -> None:
    """Raise an error in the first training pass that uses none of the modules of adapter
    ``name``."""
    if check_reach not in model._forward_hooks.values():
        model.register_forward_hook(check_reach)
    waiting = {*getattr(model, "awaited_adapters", ()), name}
    model.awaited_adapters = waiting  # type: ignore[assignment]


def check_reach(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook of an adapted network."""
    waiting: set[str] = model.awaited_adapters
    if not waiting or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    found = additions_of(model)
    for name in sorted(waiting):
        own = {path: a for path, (_, a) in found.items() if name in a.parts}
        if any(additions.reached for additions in own.values()):
            waiting.discard(name)
        elif any(_trains(additions, name) for additions in own.values()):
            paths = ", ".join(list(own)[:3])
            hint = f"this pass went through none of its {len(own)} modules: it cannot learn"
            allowed = "modules that the network calls"
            raise ConfigError(describe(f"adapter {name}", paths, allowed, hint))


def _trains(additions: Additions, name: str) -> bool:
    gain = additions.gains[name]
    on = isinstance(gain, Tensor) or gain != 0
    open_ = any(parameter.requires_grad for parameter in additions.parts[name].parameters())
    return on and open_ and additions.pristine is None
