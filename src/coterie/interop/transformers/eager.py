"""Modules that may have been compiled, run as plain Python while something watches them.

A compiled graph knows the hooks that were there when it was traced and looks for no others. So for
as long as hooks of ours are set, the modules around them are of a class of their own, which makes
every graph that they are part of out of date, and calls them without a compiler. Afterwards they
are of their own class again, and the old graphs are in use again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_ATTRIBUTE = "_coterie_eager"  # of a module: its own class, and how many want it to run eagerly


def run_eagerly(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """From now on ``modules`` run eagerly, whoever compiled them or a module around them; the
    returned function ends it."""
    # A compiled module stands for the one inside, which is there too, and passes on what is set.
    held = [module for module in dict.fromkeys(modules) if "_orig_mod" not in module._modules]
    for module in held:
        own, count = module.__dict__.get(_ATTRIBUTE, (type(module), 0))
        _become(module, own, count + 1)

    def stop() -> None:
        while held:
            module = held.pop()
            own, count = module.__dict__[_ATTRIBUTE]
            _become(module, own, count - 1)

    return stop


def _become(module: nn.Module, own: type[nn.Module], count: int) -> None:
    if count == 0:
        del module.__dict__[_ATTRIBUTE]
        module.__class__ = own
        return
    module.__dict__[_ATTRIBUTE] = own, count
    module.__class__ = _eager_class(own)


def _eager_class(own: type[nn.Module]) -> type[nn.Module]:
    """A new one each time: a graph that was traced with other hooks of ours is out of date too."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "__call__": _call_eagerly()})


def _call_eagerly() -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    disabled: Callable[..., Any] = torch.compiler.disable(call)
    return disabled


def around(model: nn.Module, path: str) -> list[nn.Module]:
    """Modules that contain the one at ``path``, the outermost first."""
    parts = path.split(".") if path else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
