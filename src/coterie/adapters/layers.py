"""What an adapter adds to one module. Shapes: r rank, I inputs of the map (of a convolution:
channels times kernel), O outputs, B batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from coterie.adapters.basis import check_capacity
from coterie.adapters.config import LoraConfig
from coterie.core.errors import ConfigError, describe

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Gain = float | Tensor


def fits(module: nn.Module) -> bool:
    """Linear maps, and convolutions that read all channels."""
    return isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1)


class LowRank(nn.Module):
    """``up [O, r]`` and ``down [r, I]``: dW = scale * up down.

    With a basis one of the two is fixed, made from the configuration and never saved.
    """

    def __init__(self, layer: nn.Module, config: LoraConfig, path: str) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | Conv)
        self.config = config
        self.shape = tuple(layer.weight.shape)
        outputs, inputs = self.shape[0], math.prod(self.shape[1:])
        rank, basis = config.rank, config.basis
        if rank > min(inputs, outputs):
            hint = f"{path} maps {inputs} to {outputs}; leave it out of targets, or lower the rank"
            raise ConfigError(describe("rank", rank, f"1..{min(inputs, outputs)}", hint))
        like: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down: Tensor
        self.up: Tensor
        if basis is None:
            self.down = nn.Parameter(torch.empty(rank, inputs, **like))
            self.up = nn.Parameter(torch.zeros(outputs, rank, **like))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            return
        width = inputs if basis.side == "input" else outputs
        check_capacity(basis, width, rank, path)
        fixed = torch.empty(rank, width) if like["device"].type == "meta" else None
        fixed = (basis.directions(width, rank) if fixed is None else fixed).to(**like)
        if basis.side == "input":
            self.register_buffer("down", fixed, persistent=False)
            self.up = nn.Parameter(torch.zeros(outputs, rank, **like))
        else:
            self.down = nn.Parameter(torch.zeros(rank, inputs, **like))
            self.register_buffer("up", fixed.T.contiguous(), persistent=False)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """What is added to ``layer(x)``."""
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale
        kernel = self.down.reshape(-1, *self.shape[1:])
        hidden = layer._conv_forward(x, kernel, None)  # its own stride, padding and dilation
        return torch.einsum("or,br...->bo...", self.up, hidden) * self.scale

    @property
    def scale(self) -> float:
        return self.config.scale

    def delta(self) -> Tensor:
        """dW f32, of the weight's shape."""
        return (self.scale * self.up.float() @ self.down.float()).reshape(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) in the shapes of PEFT's files."""
        ones = (1,) * (len(self.shape) - 2)
        rank = self.config.rank
        return self.down.reshape(rank, *self.shape[1:]), self.up.reshape(-1, rank, *ones)


class Rows(nn.Module):
    """``change [n, D]``, added to n rows of an embedding table."""

    def __init__(self, table: nn.Embedding, config: LoraConfig, path: str) -> None:
        super().__init__()
        for row in config.rows:
            if row >= table.num_embeddings:
                allowed = f"0..{table.num_embeddings - 1}, the rows of {path}"
                raise ConfigError(describe("rows", row, allowed))
        self.config, self.rows = config, config.rows
        self.change = nn.Parameter(torch.zeros_like(table.weight[: len(self.rows)]))

    def forward(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """What is added to ``table(ids)``."""
        rows = torch.tensor(self.rows, device=ids.device)
        return (ids[..., None] == rows).to(self.change.dtype) @ self.change

    def delta(self) -> tuple[tuple[int, ...], Tensor]:
        return self.rows, self.change.float()


class Additions(nn.Module):
    """All that adapters add to one module, under its child ``adapters``; ``gains``: how much of
    each, one number or one per sample [B]. A gain of 0 costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.gains: dict[str, Gain] = {}
        self.pristine: Tensor | None = None  # the weight before a merge

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.pristine is not None:
            return y
        for name, part in self.parts.items():
            gain = self.gains[name]
            if isinstance(part, Rows):  # on or off
                gain = (gain != 0).to(y) if isinstance(gain, Tensor) else float(gain != 0)
            if isinstance(gain, Tensor):
                if bool((gain != 0).any()):
                    y = y + gain.to(y).reshape(-1, *[1] * (y.dim() - 1)) * part(layer, x)
            elif gain != 0:
                added = part(layer, x)
                y = y + (added if gain == 1 else gain * added)
        return y


def add(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    """The forward hook of an adapted module."""
    return layer.adapters(layer, args[0], output)
