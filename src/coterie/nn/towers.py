"""One small network per task, all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Towers(nn.Module):
    """Task t's logit of its own features: ``forward(z [B, N, D], tasks) -> [B, N]``, where row n is
    read by the tower of ``tasks[n]``. ``hidden`` None: a linear map, else one ReLU layer."""

    def __init__(self, num_tasks: int, width: int, hidden: int | None) -> None:
        super().__init__()
        self.inner: nn.Parameter | None = None
        self.inner_bias: nn.Parameter | None = None
        if hidden is not None:
            self.inner = _uniform(num_tasks, hidden, width)
            self.inner_bias = _bias(num_tasks, hidden)
        self.weight = _uniform(num_tasks, 1, hidden or width)
        self.bias = _bias(num_tasks, 1)

    def forward(self, z: Tensor, tasks: Sequence[int]) -> Tensor:
        which = torch.tensor(list(tasks), device=z.device)
        x = z.transpose(0, 1)  # [N, B, D]
        if self.inner is not None and self.inner_bias is not None:
            x = F.relu(torch.baddbmm(self.inner_bias[which][:, None], x, self.inner[which].mT))
        return torch.baddbmm(self.bias[which][:, None], x, self.weight[which].mT)[..., 0].T


def _uniform(count: int, rows: int, columns: int) -> nn.Parameter:
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(count, rows, columns).uniform_(-bound, bound))


def _bias(*shape: int) -> nn.Parameter:
    bias = nn.Parameter(torch.zeros(shape))
    bias.use_decay = False  # type: ignore[attr-defined]
    return bias
