"""Exponential moving averages of a model's weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.tensors import assign, local, module_tensors


class Ema:
    """An average of the trainable parameters for each decay; buffers are copied.

    ``average <- average + (1 - d) (weight - average)`` with ``d = min(decay, (1 + n) / (10 + n))``
    at update n = 0, 1, ... while warming up, else ``d = decay``. Frozen parameters have no average.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float], *, warmup: bool = True) -> None:
        self.decays = tuple(decays)
        self.warmup = warmup
        self.num_updates = 0
        self._names = [name for name, p in model.named_parameters() if _averaged(p)]
        start = dict(model.named_parameters())
        self._shadows = {
            decay: [local(start[name].detach()).float().clone() for name in self._names]
            for decay in self.decays
        }
        self._buffers = {name: value.clone() for name, value in _buffers(model).items()}

    def decay_at(self, decay: float, update: int) -> float:
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if self.decays:
            parameters = dict(model.named_parameters())
            weights = [local(parameters[name]).float() for name in self._names]
            for decay, shadow in self._shadows.items():
                if shadow:
                    weight = 1 - self.decay_at(decay, self.num_updates)
                    torch._foreach_lerp_(shadow, weights, weight)
            buffers = dict(model.named_buffers(remove_duplicate=False))
            for name, value in self._buffers.items():
                value.copy_(buffers[name])
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module, decay: float | None = None) -> None:
        """Write the averaged weights (first decay by default) and buffers into ``model``."""
        parameters = dict(model.named_parameters())
        for name, value in zip(self._names, self._shadows[self._pick(decay)], strict=True):
            local(parameters[name]).copy_(value)
        for name, buffer in _buffers(model).items():
            buffer.copy_(self._buffers[name])

    @contextmanager
    def swap(self, model: nn.Module, decay: float | None = None) -> Iterator[nn.Module]:
        """Inside the block ``model`` holds the averaged weights; after it, its own again."""
        own = module_tensors(model)
        saved = {name: value.detach().clone() for name, value in own.items()}
        try:
            self.copy_to(model, decay)
            yield model
        finally:
            assign(own, saved, "weights set aside during evaluation")

    def tensors(self, decay: float) -> dict[str, Tensor]:
        """The average of one decay by parameter name, with the buffers, as in a checkpoint."""
        return {**dict(zip(self._names, self._shadows[decay], strict=True)), **self._buffers}

    def load(self, decay: float, values: Mapping[str, Tensor], num_updates: int) -> None:
        assign(self.tensors(decay), values, f"ema-{decay}")
        self.num_updates = num_updates

    def _pick(self, decay: float | None) -> float:
        if not self.decays:
            raise ConfigError(describe("ema", None, "at least one decay", "set train.ema=0.999"))
        chosen = self.decays[0] if decay is None else decay
        if chosen not in self._shadows:
            raise ConfigError(describe("decay", decay, f"one of {self.decays}"))
        return chosen


def _averaged(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.is_floating_point()


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in module_tensors(model).items()
        if not isinstance(value, nn.Parameter)
    }
