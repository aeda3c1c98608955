"""Detection of changes to a member after it was read; adapters do not count, as they are kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from coterie.adapters.attach import own_modules
from coterie.adapters.layers import additions_of
from coterie.core.tensors import tensors_of

Marks = dict[str, object]


def marks(member: object) -> Marks:
    """Version counters and hooks of a network's tensors and modules, adapters left out."""
    if not isinstance(member, nn.Module):
        return {}
    merged = {id(layer) for layer, additions in additions_of(member).values() if additions.merged}
    found: Marks = {}
    for path, module in own_modules(member).items():
        for number, value in enumerate(tensors_of(module)):
            written = 0 if value.is_inference() or id(module) in merged else value._version
            found[f"{path}.{number}"] = (value.dtype, value.shape, written)
        listening = _listeners(module)
        if listening:
            found[f"{path}: hooks"] = listening
    return found


def _listeners(module: Any) -> int:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    own = [hook for table in hooks for hook in table.values()]
    return sum(
        not str(getattr(hook, "__module__", "")).startswith("coterie.adapters") for hook in own
    )


def changed(before: Marks, member: object) -> str:
    """A description of the first change since the member was read; "" if there is none."""
    after = marks(member)
    for key in (*before, *after):
        if before.get(key) != after.get(key) and not _forgiven(before.get(key), after.get(key)):
            return key
    return ""


def _forgiven(before: object, after: object) -> bool:
    """A tensor that adapters have merged into is as its files say once they are taken off."""
    same = isinstance(before, tuple) and isinstance(after, tuple) and before[:2] == after[:2]
    return same and isinstance(after, tuple) and after[2] == 0
