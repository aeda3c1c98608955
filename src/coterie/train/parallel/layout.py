"""How tensors of a run are split over processes; whole tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coterie.train.parallel.config import parts_of
from coterie.train.parallel.processes import Processes
from coterie.train.parallel.sharding import is_sharded
from coterie.train.world import Groups


class Cut(NamedTuple):
    """The axes along which a tensor's first dimension is split, experts first."""

    expert: bool = False
    shard: bool = False


class Layout:
    """The splits of a model's parameters, by name. Parameters without an entry are whole
    everywhere."""

    def __init__(self, processes: Processes, model: nn.Module, experts: Mapping[str, int]) -> None:
        self.processes = processes
        self._cuts: dict[str, Cut] = {}
        self._rows: dict[str, int] = {}  # of the part that shards cut
        self._experts = experts  # how many, of the whole tensor
        for name, value in model.named_parameters(remove_duplicate=False):
            self._cuts[name] = Cut(name in experts, is_sharded(value))
            self._rows[name] = value.shape[0] if value.dim() else 1

    def of(self, name: str) -> Cut:
        """Of a trained parameter, by its name in the optimiser."""
        owner, _, own = name.partition(".")
        return self._cuts.get(own, Cut()) if owner == "model" else Cut()

    def whole(self, state: Groups) -> Groups:
        """A checkpoint's tensors, on the CPU; empty but in the first process."""
        return {
            group: {name: self._gathered(group, name, v) for name, v in tensors.items()}
            for group, tensors in state.items()
        }

    def part(self, state: Groups) -> Groups:
        """What this process holds of a checkpoint's tensors."""
        return {
            group: {name: self._part(group, name, v) for name, v in tensors.items()}
            for group, tensors in state.items()
        }

    def _gathered(self, group: str, name: str, value: Tensor) -> Tensor:
        value, own = value.detach(), _model_name(group, name)
        cut = self._cuts.get(own, Cut()) if value.dim() else Cut()
        if cut.shard:
            rows = self._rows[own]
            padded = value.new_zeros(-(-rows // self.processes.config.shard), *value.shape[1:])
            padded[: len(value)] = value
            value = self.processes.joined(padded, ("shard",))[:rows]
        if cut.expert:
            sizes = parts_of(self._experts[own], self.processes.config.expert)
            padded = value.new_zeros(sizes[0], *value.shape[1:])
            padded[: len(value)] = value
            parts = self.processes.joined(padded, ("expert",)).split(sizes[0])
            value = torch.cat([part[:size] for part, size in zip(parts, sizes)])
        return value.cpu() if self.processes.rank == 0 else value.new_empty(0)

    def _part(self, group: str, name: str, value: Tensor) -> Tensor:
        cut = self._cuts.get(_model_name(group, name), Cut()) if value.dim() else Cut()
        config, place = self.processes.config, self.processes.place
        if cut.expert:
            value = value.tensor_split(config.expert)[place["expert"]]
        if cut.shard:
            parts = value.chunk(config.shard)
            value = parts[place["shard"]] if place["shard"] < len(parts) else value[:0]
        return value


def _model_name(group: str, name: str) -> str:
    """A checkpoint's tensor by the parameter of the model that has its shape, "" for others."""
    if group == "objective":
        return ""
    if group != "optimizer":
        return name
    owner, _, own = name.partition("/")[2].partition(".")
    return own if owner == "model" else ""
