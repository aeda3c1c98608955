"""A model without weights, and copies of it with weights, for reading members one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.core.tensors import assign, module_tensors

Cast = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """A model whose weights were removed.

    ``shapes``: of its tensors, by name; ``later``: tensors that are filled after :meth:`make`.
    Copies can be made in any thread and draw no random numbers.
    """

    model: nn.Module
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    later: frozenset[str]

    @staticmethod
    def of(model: nn.Module, later: Collection[str] = ()) -> Blueprint:
        """The blueprint of ``model``, which loses its weights and is of no use afterwards."""
        tensors = module_tensors(model)
        shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        for value in tensors.values():
            value.data = value.data.new_empty(0)
        return Blueprint(model, shapes, frozenset(later))

    def make(
        self, values: Mapping[str, Tensor], origin: str, cast: Cast | None = None
    ) -> nn.Module:
        """A model with ``values`` as its weights (not copied), in eval mode.

        ``cast(name, value)``: their dtypes (None: the model's own). CheckpointError unless names
        and shapes match.
        """
        change = cast or self._own_type
        ready = {name: change(name, value) for name, value in values.items()}
        stand_ins = {
            name: torch.empty(shape, dtype=ready.get(name, torch.empty(0, dtype=dtype)).dtype,
                              device="meta")
            for name, (shape, dtype) in self.shapes.items()
            if name not in self.later
        }  # fmt: skip
        assign(stand_ins, ready, origin)  # on meta nothing is copied
        model = copy.deepcopy(self.model)
        for name, tensor in module_tensors(model).items():
            shape, dtype = self.shapes[name]
            tensor.data = ready[name] if name in ready else torch.empty(shape, dtype=dtype)
        return model.eval()

    def _own_type(self, name: str, value: Tensor) -> Tensor:
        known = name in self.shapes and value.is_floating_point()
        return value.to(self.shapes[name][1]) if known else value
