"""Which rows are padding, read from the attention mask that a model is given.

Legend: B samples, N tokens of this call, S tokens the mask covers (with a cache, S >= N).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class MaskReader:
    """Watches the modules around a layer for a two-dimensional mask under the argument ``name``."""

    def __init__(self, model: nn.Module, path: str, name: str) -> None:
        self.name = name
        self._around = [
            (module, place)
            for module in _above(model, path)
            if (place := _place(module, name)) is not None
        ]
        self._mask: Tensor | None = None

    def attach(self) -> list[Any]:
        """Hook handles; the mask is forgotten when the module that was given it ends."""
        self._mask = None
        handles: list[Any] = []
        for module, place in self._around:

            def before(_: nn.Module, args: Any, kwargs: Any, place: int = place) -> None:
                given = kwargs.get(self.name, args[place] if place < len(args) else None)
                if isinstance(given, Tensor) and given.dim() == 2:
                    self._mask = given

            def after(_: nn.Module, args: Any, output: Any) -> None:
                self._mask = None

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        return handles

    def rows(self, shape: tuple[int, int]) -> Tensor | None:
        """bool [B*N], True = a real token; None where no mask was given that covers the call."""
        mask = self._mask
        if mask is None or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            return None
        return mask[:, -shape[1] :].reshape(-1).to(torch.bool)


def _above(model: nn.Module, path: str) -> list[nn.Module]:
    """Modules that contain the one at ``path``, the outermost first."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _place(module: nn.Module, name: str) -> int | None:
    """Position of the argument in the module's forward, or None if it has none."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(name) if name in names else None
