"""Fully sharded training: parameters, gradients and optimiser state in equal parts (FSDP2)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from coterie.backbones.trunk import Block
from coterie.train.parallel.processes import Processes

LEAST = 2**19
"""Numbers worth a message of their own."""


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """What is gathered at a time: neighbouring blocks of a trunk until they are worth a message;
    the rest goes with the model."""
    made: list[list[nn.Module]] = []
    for owner in model.modules():
        size = LEAST
        for block in (child for child in owner.children() if isinstance(child, Block)):
            if size >= LEAST:
                made.append([])
                size = 0
            made[-1].append(block)
            size += sum(parameter.numel() for parameter in block.parameters())
    return made


def shard_model(model: nn.Module, blocks: list[list[nn.Module]], processes: Processes) -> None:
    """Cut every parameter along its first dimension; scalars, and what several blocks use, stay
    whole in every process."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    group = processes.groups[("shard",)]
    mesh = DeviceMesh.from_group(group, device, mesh_dim_names=("shard",))
    kept = _kept_whole(model, [block for together in blocks for block in together])
    for together in blocks:
        # A loss on prototypes reads them when the block's forward is over; the backward pass begins
        # with the last block.
        named = (name for block in together for name, _ in block.named_parameters())
        read_later = any(name.endswith("prototypes") for name in named)
        again = not read_later and together is not blocks[-1]
        fully_shard(together, mesh=mesh, reshard_after_forward=again, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    for module in (model, *(together[0] for together in blocks)):
        # Gradients are added up, not averaged, as those of whole parameters are.
        cast(Any, module).set_gradient_divide_factor(1.0)
        cast(Any, module).set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Gradients of micro-batches but the last stay where they are."""
    cast(Any, model).set_requires_gradient_sync(last)


def is_sharded(value: Tensor) -> bool:
    return hasattr(value, "to_local")


def _kept_whole(model: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    users: dict[nn.Parameter, int] = {}
    for block in blocks:
        for parameter in block.parameters():
            users[parameter] = users.get(parameter, 0) + 1
    return {p for p in model.parameters() if p.dim() == 0 or users.get(p, 0) > 1}
