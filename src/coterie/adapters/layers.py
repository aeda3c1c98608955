"""The additions of adapters to one module. Shapes: r rank, I inputs of the map (of a convolution:
channels times kernel), O outputs, B batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from coterie.adapters.basis import check_capacity
from coterie.adapters.config import LoraConfig
from coterie.adapters.stacks import Stacks
from coterie.core.errors import ConfigError, describe
from coterie.core.tensors import borrow

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Gain = float | Tensor


def fits(module: nn.Module) -> bool:
    """Linear maps, and convolutions that read all channels; not the output of torch's own
    attention, whose weight is read past the module."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or (isinstance(module, Conv) and module.groups == 1)


class LowRank(nn.Module):
    """``up [O, r]`` and ``down [r, I]``: dW = scale * up down, and with ``bias`` a change [O] too.

    With a basis one of the two is fixed, made from the configuration and never saved. With ``conv``
    "kernel", k the kernel's first size: up [O k, r k] and down [r k, I / k].
    """

    def __init__(self, layer: nn.Module, config: LoraConfig, path: str, bias: bool = False) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | Conv)
        self.config = config
        self.shape = tuple(layer.weight.shape)
        self.rank = _rank(config, self.shape, path)
        self.scale = config.scale_of(path)
        side = self.shape[2] if config.conv == "kernel" and len(self.shape) > 2 else 1
        outputs, inputs = self.shape[0] * side, math.prod(self.shape[1:]) // side
        rank, basis = self.rank * side, config.basis
        like: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down: Tensor
        self.up: Tensor
        self.shift = nn.Parameter(torch.zeros(self.shape[0], **like)) if bias else None
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

    def forward(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """What is added to ``y = layer(x)``."""
        if isinstance(layer, nn.Linear):
            made = nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale
        elif self.config.conv == "kernel":
            made = layer._conv_forward(x, self.scale * (self.up @ self.down).view(self.shape), None)
        else:
            kernel = self.down.reshape(-1, *self.shape[1:])
            hidden = layer._conv_forward(x, kernel, None)  # its own stride, padding and dilation
            made = torch.einsum("or,br...->bo...", self.up, hidden) * self.scale
        return made if self.shift is None else made + along(layer, self.shift, y)

    def delta(self) -> Tensor:
        """dW f32, of the weight's shape."""
        return (self.scale * self.up.float() @ self.down.float()).reshape(self.shape)

    def merge_into(self, own: dict[str, Tensor], gain: float) -> None:
        own["weight"] = own["weight"] + gain * self.delta()
        if self.shift is not None:
            own["bias"] = own["bias"] + gain * self.shift.float()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) in the shapes of PEFT's files."""
        ones = (1,) * (len(self.shape) - 2)
        return self.down.reshape(self.rank, *self.shape[1:]), self.up.reshape(-1, self.rank, *ones)


def _rank(config: LoraConfig, shape: tuple[int, ...], path: str) -> int:
    """The rank in a module; ConfigError where it is too narrow and ``config`` says so."""
    outputs, inputs = shape[0], math.prod(shape[1:] if config.conv == "channels" else shape[1:2])
    rank = config.rank_of(path)
    if rank <= min(inputs, outputs):
        return rank
    if config.narrow == "lower":
        return min(inputs, outputs)
    hint = f"{path} maps {inputs} to {outputs}; leave it out of targets, or lower the rank"
    raise ConfigError(describe("rank", rank, f"1..{min(inputs, outputs)}", hint))


def along(layer: nn.Module, values: Tensor, y: Tensor) -> Tensor:
    """One number per output of ``layer``, [O], shaped to be added to its answer y."""
    last = isinstance(layer, nn.Linear | nn.LayerNorm)
    return values if last else values.reshape(-1, *[1] * (y.dim() - 2))


class Shift(nn.Module):
    """``change`` [O], added to the bias of a module that is not changed otherwise."""

    def __init__(self, layer: nn.Module, config: LoraConfig, path: str) -> None:
        super().__init__()
        self.config = config
        assert isinstance(layer.bias, Tensor)
        self.change = nn.Parameter(torch.zeros_like(layer.bias, requires_grad=False))

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return along(layer, self.change, y)

    def merge_into(self, own: dict[str, Tensor], gain: float) -> None:
        own["bias"] = own["bias"] + gain * self.change.float()


class Copy(nn.Module):
    """A module of the adapter's own, in place of the network's where the adapter is on."""

    def __init__(self, layer: nn.Module, config: LoraConfig, path: str) -> None:
        super().__init__()
        self.config = config
        if any(True for _ in layer.children()) and not _is_plain(layer):
            hint = "name the modules inside"
            raise ConfigError(describe("copies", path, "modules without others inside", hint))
        self.own = copy.deepcopy(layer)
        if isinstance(getattr(self.own, "adapters", None), Additions):
            del self.own.adapters
        self.own._forward_hooks.clear()
        self.own._forward_pre_hooks.clear()
        borrow(self.own, False)
        for parameter in self.own.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(
        self, layer: nn.Module, x: Tensor, y: Tensor, rest: tuple[Any, ...] = (), **named: Any
    ) -> Any:
        return self.own(x, *rest, **named)

    def merge_into(self, own: dict[str, Tensor], gain: float) -> None:
        if gain != 0:
            own.update(own_state(self.own))


def _is_plain(layer: nn.Module) -> bool:
    return all(isinstance(child, Additions) for child in layer.children())


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

    def forward(self, table: nn.Embedding, ids: Tensor, y: Tensor) -> Tensor:
        """What is added to ``table(ids)``."""
        rows = torch.tensor(self.rows, device=ids.device)
        return (ids[..., None] == rows).to(self.change.dtype) @ self.change

    def merge_into(self, own: dict[str, Tensor], gain: float) -> None:
        """Add the rows, whatever the weight."""
        if gain != 0:
            rows = torch.tensor(self.rows, device=self.change.device)
            own["weight"] = own["weight"].index_add(0, rows, self.change.float())


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def own_state(layer: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers by name, not those of its children."""
    return {n: v for n, v in layer.state_dict(keep_vars=True).items() if "." not in n}


Part = LowRank | Rows | Shift | Copy | Stacks
"""What one adapter does to one module."""


class Additions(nn.Module):
    """All adapters of one module, its child ``adapters``.

    ``gains``: weight of each, one number or one per sample [B]. Weight 0 costs nothing; with
    weights per sample, only samples with another weight do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.gains: dict[str, Gain] = {}
        self.merged = False  # whether it ever was
        self.reached = False  # whether any pass went through the module
        self.pristine: dict[str, Tensor] | None = None  # the module's tensors before a merge

    def forward(
        self, layer: nn.Module, x: Tensor, y: Tensor, rest: tuple[Any, ...] = (), **named: Any
    ) -> Tensor:
        self._note()
        if self.pristine is not None:
            return y
        plain = y  # copies come before what is added
        for name, part in self.parts.items():
            if isinstance(part, Copy):
                if y is not plain and not isinstance(self.gains[name], Tensor):
                    refuse_two_copies(name, self.gains[name])
                if isinstance(self.gains[name], Tensor) and (rest or named):
                    hint = f"{type(layer).__name__} reads more than rows"
                    raise ConfigError(describe(f"weights.{name}", "per sample", "a number", hint))
                y = _replaced(layer, part, self.gains[name], x, y, rest, named)
        for name, part in self.parts.items():
            if not isinstance(part, Copy | Stacks):
                y = _added(layer, part, self.gains[name], x, y)
        return y

    def read(
        self, layer: nn.Module, own: dict[str, Tensor], only: tuple[type[nn.Module], ...] = ()
    ) -> dict[str, Tensor]:
        """The parameters ``own`` of ``layer`` with all that is added (by parts of some kinds
        ``only``), of their types."""
        self._note()
        if self.pristine is not None:
            return own
        for name, gain in self.gains.items():
            if isinstance(gain, Tensor):
                hint = f"the weights of {type(layer).__name__} are read once for all samples"
                raise ConfigError(describe(f"weights.{name}", "per sample", "a number", hint))
        total = self.total(own, only or (nn.Module,))
        return {name: total[name].to(value.dtype) for name, value in own.items()}

    def total(
        self, own: Mapping[str, Tensor], only: tuple[type[nn.Module], ...] = (nn.Module,)
    ) -> dict[str, Tensor]:
        """``own`` with what is added, summed in float32 at least: copies first (what is added is
        added to the module that answers), then sorted by name."""
        total = {n: _wide(v) if v.is_floating_point() else v for n, v in own.items()}
        copied = False
        names = [name for name, part in self.parts.items() if isinstance(part, only)]
        for name in sorted(names, key=lambda n: (not isinstance(self.parts[n], Copy), n)):
            part, gain = self.parts[name], self.gains[name]
            assert isinstance(part, Part) and not isinstance(gain, Tensor)
            if copied and isinstance(part, Copy):
                refuse_two_copies(name, gain)
            copied = copied or (isinstance(part, Copy) and gain != 0)
            if gain != 0:
                part.merge_into(total, gain)
        return total

    def _note(self) -> None:
        if not (self.reached or torch.compiler.is_compiling()):
            self.reached = True


def _replaced(
    layer: nn.Module,
    part: Copy,
    gain: Gain,
    x: Tensor,
    y: Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
) -> Tensor:
    """y with the answer of the adapter's own module where its gain is not 0."""
    if not isinstance(gain, Tensor):
        return y if gain == 0 else part(layer, x, y, rest, **named)
    rows = gain.nonzero()[:, 0]
    if not len(rows):
        return y
    made: Tensor = part(layer, x[rows], y)
    return y.index_copy(0, rows, made.to(y))


def _added(layer: nn.Module, part: nn.Module, gain: Gain, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(part, Rows):  # on or off
        gain = (gain != 0).to(y) if isinstance(gain, Tensor) else float(gain != 0)
    if not isinstance(gain, Tensor):
        if gain == 0:
            return y
        added = part(layer, x, y)
        return y + (added if gain == 1 else gain * added)
    rows = gain.nonzero()[:, 0]
    if not len(rows):
        return y
    share = gain.to(y).reshape(-1, *[1] * (y.dim() - 1))
    if len(rows) == len(gain):
        return y + share * part(layer, x, y)
    return y.index_add(0, rows, (share[rows] * part(layer, x[rows], y)).expand_as(y[rows]))


def refuse_two_copies(name: str, gain: Gain) -> None:
    if isinstance(gain, Tensor) or gain != 0:
        hint = "of a module that adapters have copies of, one copy answers"
        raise ConfigError(describe(f"weights.{name}", gain, "0 while another copy is on", hint))


def add(layer: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """The forward hook of an adapted module."""
    if not args:
        name = next(iter(named))
        args, named = (named[name],), {n: value for n, value in named.items() if n != name}
    return layer.adapters(layer, args[0], output, args[1:], **named)


def additions_of(model: nn.Module) -> dict[str, tuple[nn.Module, Additions]]:
    """Path of each adapted module -> it, and what is added to it."""
    return {
        path: (module, module.adapters)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "adapters", None), Additions)
        and isinstance(module.adapters, Additions)
    }
