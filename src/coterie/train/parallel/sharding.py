"""Parameters, gradients and optimiser state in equal parts (FSDP2: ``fully_shard``)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from coterie.backbones.trunk import Block
from coterie.train.parallel.processes import Processes


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the blocks of every trunk; the rest goes with the model."""
    return [module for module in model.modules() if isinstance(module, Block)]


def shard_model(model: nn.Module, blocks: list[nn.Module], processes: Processes) -> None:
    """Cut every parameter along its first dimension; scalars, and what several blocks use, stay
    whole in every process."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    group = processes.groups[("shard",)]
    mesh = DeviceMesh.from_group(group, device, mesh_dim_names=("shard",))
    kept = _kept_whole(model, blocks)
    for block in blocks:
        # A loss on prototypes reads them when the block's forward is over; the backward pass begins
        # with the last block.
        read_later = any(name.endswith("prototypes") for name, _ in block.named_parameters())
        again = not read_later and block is not blocks[-1]
        fully_shard(block, mesh=mesh, reshard_after_forward=again, ignored_params=kept)
    whole = fully_shard(model, mesh=mesh, ignored_params=kept)
    for module in (whole, *blocks):
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
