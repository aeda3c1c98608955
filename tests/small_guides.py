"""A small network that reads pictures of 8 x 8, and guides made of it, without training runs."""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn

from coterie.adapters import LoraConfig
from coterie.guides import Guide, Reader, ReaderConfig, suggested
from coterie.process import PROCESSES, Process
from coterie.process.ranges import equal_ranges

DDPM: Process = PROCESSES.parse("ddpm").build()
FULL = LoraConfig(targets=(), copies=("*",))


def reader(task: str = "classes", seed: int = 0) -> Reader:
    """With statistics of its own, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ReaderConfig.from_dict(
            {"task": task, "image_size": 8, "width": 8, "feature_dim": 16, "classes": 3}
        ).build()
    rng = Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=rng)
            module.running_var.uniform_(0.5, 2.0, generator=rng)
    return network.eval()


def guide(
    network: nn.Module | None = None,
    ranges: int = 3,
    process: Process = DDPM,
    adapter: LoraConfig | None = None,
) -> Guide:
    network = copy.deepcopy(network) if network is not None else reader()
    found = adapter or suggested(network, rank=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Guide(network, process, equal_ranges(process, ranges), found).eval()


@torch.no_grad()
def wake(made: Guide, seed: int = 0) -> Guide:
    """Move everything that experts own, each in its own way."""
    rng = Generator().manual_seed(seed)
    for index in range(len(made.names)):
        for name, value in made.expert(index).items():
            if value.is_floating_point():
                noise = 0.3 * torch.randn(value.shape, generator=rng)
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    return made


def pictures(batch: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=Generator().manual_seed(seed))
