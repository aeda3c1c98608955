"""A mixture-of-experts layer alone, in any network: rows [N, D] in, rows [N, D] out.

The data have four regimes, each a linear map of its own. Eight small experts, of which two serve a
row, are compared with one network of the inner size that serves a row there.

    python examples/expert_layer_alone.py --steps 600
"""

import argparse

import torch
from torch import Tensor, nn

from coterie import ExpertLayerConfig


def regimes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows x [N, 16] and answers [N, 16]: one of four maps, chosen by the signs of two inputs."""
    maps = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)) / 4
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    regime = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x, torch.einsum("nij,nj->ni", maps[regime], x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of each network")
    given = parser.parse_args()

    experts = {"kind": "gelu_mlp", "hidden": 32}
    config = ExpertLayerConfig(num_experts=8, experts=experts, balance=("switch",))
    layer = config.build(16)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 16))
    parameters = [*layer.parameters(), *dense.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(given.steps):
        x, target = regimes(256, seed=1 + step)
        answer = layer(x)
        loss = (answer.y - target).square().mean() + (dense(x) - target).square().mean()
        for balance in config.balance:
            loss = loss + sum(aux.weight * aux.value for aux in balance.losses(answer.routings))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    with torch.no_grad():
        x, target = regimes(4096, seed=0)
        answer = layer(x)
        print(f"error of the experts      {(answer.y - target).square().mean():.4f}")
        print(f"error of one network      {(dense(x) - target).square().mean():.4f}")
    (routing,) = answer.routings
    print("rows that each expert serves:", routing.counts().int().tolist())


if __name__ == "__main__":
    main()
