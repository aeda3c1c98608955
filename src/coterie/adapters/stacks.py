"""Low-rank additions to stacked experts: one pair of factors per expert and parameter.

Experts here and in Hugging Face models are parameters ``[E, O, I]``, no modules. A pool of ours is
read through :func:`coterie.core.tensors.effective`, so every dispatch sees what is added; the
module of another library, which reads its own parameters when it is called, is lent the sums for
the time of the call. Legend: E experts, O outputs, I inputs of a map (of a kernel: channels times
kernel), r rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from coterie.adapters.config import LoraConfig
from coterie.core.errors import ConfigError, describe


def stacked(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own parameters that are stacks of maps, one per expert."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return ()
    own = {n: p for n, p in module._parameters.items() if p is not None}
    if hasattr(module, "expert_state"):
        return tuple(name for name, value in own.items() if value.dim() > 2)
    return tuple(n for n, value in own.items() if value.dim() == 3 and len(value) > 1)


class Stacks(nn.Module):
    """``up [E, O, r]`` and ``down [E, r, I]`` of each parameter: dW_e = scale up_e down_e."""

    def __init__(
        self, module: nn.Module, config: LoraConfig, path: str, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.config, self.names = config, names
        self.shapes = {name: tuple(module.get_parameter(name).shape) for name in names}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, (experts, outputs, *rest) in self.shapes.items():
            like: Any = module.get_parameter(name)
            inputs = math.prod(rest)
            rank = _rank(config, outputs, inputs, f"{path}.{name}")
            self.down[name] = nn.Parameter(like.new_empty(experts, rank, inputs))
            self.up[name] = nn.Parameter(like.new_zeros(experts, outputs, rank))
            nn.init.uniform_(self.down[name], -(inputs**-0.5), inputs**-0.5)

    def ranks(self) -> set[int]:
        return {down.shape[1] for down in self.down.values()}

    def delta(self, name: str) -> Tensor:
        """dW f32 of one parameter, of its shape."""
        made = torch.bmm(self.up[name].float(), self.down[name].float())
        return (self.config.scale * made).reshape(self.shapes[name])

    def merge_into(self, own: dict[str, Tensor], gain: float) -> None:
        for name in self.names:
            own[name] = own[name] + gain * self.delta(name)


def _rank(config: LoraConfig, outputs: int, inputs: int, path: str) -> int:
    if config.rank <= min(inputs, outputs):
        return config.rank
    if config.narrow == "lower":
        return min(inputs, outputs)
    hint = f"{path} maps {inputs} to {outputs}; leave it out of experts, or lower the rank"
    raise ConfigError(describe("rank", config.rank, f"1..{min(inputs, outputs)}", hint))


def lend(layer: Any, args: tuple[Any, ...]) -> None:
    """Before a call of a module that reads its own stacks: replace them by the sums."""
    names = [n for part in layer.adapters.parts.values() for n in getattr(part, "names", ())]
    own = {name: layer._parameters[name] for name in dict.fromkeys(names)}
    layer.__dict__.update(layer.adapters.read(layer, own, only=(Stacks,)))


def take_back(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    """After the call, even if it failed: restore the stacks."""
    for part in layer.adapters.parts.values():
        for name in getattr(part, "names", ()):
            layer.__dict__.pop(name, None)
