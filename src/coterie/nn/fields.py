"""Categorical fields become one row of features.

Shapes: B samples, C columns, F fields, d width of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import DataError, describe


class FieldEmbedding(nn.Module):
    """``forward(x i64 [B, C]) -> [B, F * d]``; -1 is nothing, a set is the mean of its members.

    ``fields``: (number of ids, number of columns) of each. One table holds the rows of all; its
    first row is nothing, stays 0 and has no gradient.
    """

    offset: Tensor
    size: Tensor
    field: Tensor

    def __init__(self, fields: Sequence[tuple[int, int]], width: int, std: float = 0.1) -> None:
        super().__init__()
        self.num_fields = len(fields)
        starts = list(accumulate((size for size, _ in fields), initial=1))
        columns = [index for index, (_, count) in enumerate(fields) for _ in range(count)]
        offset = torch.tensor([starts[index] for index in columns])
        self.register_buffer("offset", offset, persistent=False)
        sizes = torch.tensor([fields[index][0] for index in columns])
        self.register_buffer("size", sizes, persistent=False)
        self.register_buffer("field", torch.tensor(columns), persistent=False)
        self.weight = nn.Parameter(torch.randn(starts[-1], width) * std)
        with torch.no_grad():
            self.weight[0].zero_()

    def forward(self, x: Tensor) -> Tensor:
        wrong = ((x < -1) | (x >= self.size)).any(0)
        if bool(wrong.any()):
            column = int(wrong.nonzero()[0])
            found = x[:, column][(x[:, column] < -1) | (x[:, column] >= self.size[column])]
            allowed = f"-1..{int(self.size[column]) - 1}"
            raise DataError(describe(f"x: column {column}", int(found[0]), allowed))
        there = x >= 0
        rows = torch.where(there, x + self.offset, 0)
        e_BCd = F.embedding(rows, self.weight, padding_idx=0)
        if x.shape[1] == self.num_fields:
            return e_BCd.flatten(1)
        shape = (len(x), self.num_fields)
        total = e_BCd.new_zeros(*shape, e_BCd.shape[2]).index_add(1, self.field, e_BCd)
        count = e_BCd.new_zeros(shape).index_add(1, self.field, there.to(e_BCd.dtype))
        return (total / count.clamp_min(1)[..., None]).flatten(1)
