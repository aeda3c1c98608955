"""A run in several processes: the implementation of :class:`World` for them.

Every process has an equal run of each micro-batch. Experts lie in parts along ``expert``, and all
parameters of the model (what an expert process holds among them) in equal parts of their first
dimension along ``shard``. The loss is the mean over all processes: each goes back from its part of
that, and gradients are added up. Checkpoints hold whole tensors, as those of one process do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coterie.core.batch import Losses
from coterie.core.errors import ConfigError, describe
from coterie.core.share import sharing
from coterie.core.tensors import local
from coterie.train import checkpoint
from coterie.train.batch_parts import check_apart
from coterie.train.checkpoint import Checkpoint
from coterie.train.parallel.exchange import split_experts
from coterie.train.parallel.gradients import GradientSum, total_norm
from coterie.train.parallel.layout import Layout
from coterie.train.parallel.processes import Processes
from coterie.train.parallel.sharding import blocks_of, is_sharded, shard_model, sync_gradients
from coterie.train.signals import StopSignals
from coterie.train.world import Groups, World


class Spread(World):
    """This process's part of a run."""

    layout: Layout
    _sum: GradientSum
    _said: Tensor
    """What this process has to say about the step, f32 [N]."""
    _heard: Tensor
    """What all said, f32 [P, N]."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.is_first = processes.rank == 0
        self.count = processes.count
        self.stream = (processes.rank,)
        self._sharded: list[tuple[nn.Parameter, nn.Parameter]] = []  # the model's, what we hold
        self._model: nn.Module | None = None
        self._signals: StopSignals | None = None
        self._received: int | None = None

    def distribute(self, model: nn.Module) -> None:
        config = self.processes.config
        check_apart(model, "parallel", "no process")
        experts = split_experts(model, self.processes) if config.expert > 1 else {}
        if config.shard > 1:
            shard_model(model, blocks_of(model), self.processes)
            self._model = model
        self.layout = Layout(self.processes, model, experts)

    def local(
        self, parameters: dict[str, nn.Parameter], optimizer: Optimizer
    ) -> dict[str, nn.Parameter]:
        held = dict(parameters)
        for name, value in parameters.items():
            if is_sharded(value):
                held[name] = nn.Parameter(local(value.detach()))
                self._sharded.append((value, held[name]))
        replaced = {id(value): held[name] for name, value in parameters.items()}
        for group in optimizer.param_groups:
            group["params"] = [replaced[id(value)] for value in group["params"]]
        self._sum = GradientSum(held, self.layout, self.processes)
        return held

    def watch(self, signals: StopSignals) -> None:
        self._signals = signals

    def sharing(self) -> AbstractContextManager[None]:
        return sharing(self.processes.share)

    def own(self, indices: np.ndarray) -> np.ndarray:
        check_divides(len(indices), self.count)
        return np.split(indices, self.count)[self.processes.rank]

    def before_backward(self, loss: Tensor, last: bool) -> Tensor:
        if self._model is not None:
            sync_gradients(self._model, last)
        if last:
            self._sum.start(self._said)
        return loss / self.count

    def collect(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for whole, part in self._sharded:
            part.grad = None if whole.grad is None else local(whole.grad)
            whole.grad = None
        self._heard = self._sum.finish()

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        return total_norm(parameters, self.layout, self.processes)

    def joining(
        self, total: Tensor, losses: list[Losses]
    ) -> Callable[[], tuple[Tensor, list[Losses]]]:
        """All of it, and which signal came, travels with the gradients."""
        received = (self._signals and self._signals.received) or 0
        said = [total.new_tensor([received]), total[None]]
        for one in losses:
            said += [value[None] for value in one.main.values()]
            said += [aux.value[None] for aux in one.aux]
            said += [value for value in (one.per_sample, one.noise) if value is not None]
        self._said = torch.cat([value.float() for value in said])

        def read() -> tuple[Tensor, list[Losses]]:
            parts = iter(self._heard.split([len(value) for value in said], dim=1))
            self._received = int(next(parts).max()) or None
            return next(parts).mean(), [self._read(one, parts) for one in losses]

        return read

    def _read(self, losses: Losses, parts: Iterator[Tensor]) -> Losses:
        return Losses(
            main={name: next(parts).mean() for name in losses.main},
            aux=tuple(replace(aux, value=next(parts).mean()) for aux in losses.aux),
            per_sample=None if losses.per_sample is None else next(parts).flatten(),
            noise=None if losses.noise is None else next(parts).flatten(),
        )

    def any_of(self, names: Iterable[str | None]) -> list[str | None]:
        found = self.processes.told(list(names))
        return [next((name for name in each if name is not None), None) for each in zip(*found)]

    def stopped_by(self, signals: StopSignals) -> int | None:
        return self._received

    def on_first(self, work: Callable[[], Any]) -> Any:
        return self.processes.on_first(work)

    def in_turn(self, work: Callable[[], Any]) -> Any:
        if not self.is_first:
            self.processes.on_first(lambda: None)
            return work()
        done: list[Any] = []
        self.processes.on_first(lambda: done.append(work()))
        return done[0]

    def newest(self, run: Path, config_hash: str) -> Checkpoint | None:
        def find() -> str | None:
            path = checkpoint.latest(run, config_hash)
            return None if path is None else str(path)

        path = self.on_first(find)
        return None if path is None else checkpoint.load(path)

    def whole(self, state: Groups) -> Groups:
        return self.layout.whole(state)

    def part(self, state: Groups) -> Groups:
        return self.layout.part(state)


def check_divides(samples: int, count: int) -> None:
    """ConfigError unless the samples of a micro-batch can be split evenly over ``count``
    processes."""
    if samples % count:
        allowed = f"a multiple of {count}, the number of processes"
        hint = "each has an equal part of every micro-batch, train.batch / train.accumulate"
        raise ConfigError(describe("train.batch", samples, allowed, hint))
