"""Gradients of one optimiser step: micro-batches, mixed precision, finiteness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, TrainingError, describe
from coterie.core.rng import derive, generator
from coterie.core.routing import Routing
from coterie.core.share import Turns
from coterie.data import order
from coterie.train.batch_parts import check_apart
from coterie.train.config import TrainConfig
from coterie.train.nonfinite import check_batch, first_nonfinite, last_bad_gradient
from coterie.train.precision import autocast
from coterie.train.world import ALONE, World

Buffers = list[tuple[nn.Module, dict[str, Tensor]]]


@dataclass(eq=False)
class StepResult:
    """The result of one step. Lists hold one entry per micro-batch."""

    loss: float  # mean of the micro-batches' totals
    grad_norm: float  # before clipping
    losses: list[Losses]
    routings: tuple[Routing, ...]
    tokens: int  # 0 = unknown
    problem: dict[str, Any] = field(default_factory=dict)  # not empty: the step must be skipped


class GradientStep:
    """Draws the samples of a step, runs the objective and computes (clipped) gradients.

    All random numbers of step s are a function of (seed, s): those of the objective's generator (on
    the CPU, equal for every device), from which each micro-batch takes its own rows, and those of
    torch's global generator (third-party dropout), per micro-batch. Sums over the batch are over
    all micro-batches, computed before the first backward pass (:class:`Turns`).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        objective: Any,
        source: Any,
        parameters: dict[str, nn.Parameter],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.model = model
        self.objective = objective
        self.source = source
        self.parameters = parameters
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.world = world
        world.own(np.arange(config.batch // config.accumulate))  # refused here if not equal
        if config.accumulate > 1:
            check_apart(model, "train.accumulate", "no micro-batch")
        self.sums = True  # whether anything is summed over the batch; until shown, it may be
        if config.compile and world.count > 1:
            hint = "what processes say to each other is not compiled"
            raise ConfigError(describe("train.compile", True, "false in several processes", hint))
        self.forward_model: Any = torch.compile(model) if config.compile else model

    def __call__(self, step: int, samples_seen: int, *, keep_routings: bool) -> StepResult:
        accumulate = self.config.accumulate
        indices = order(self.seed, samples_seen, self.config.batch, len(self.source))
        buffers = self._buffers()
        parts = _Parts(self, indices, step, buffers)
        total = torch.zeros((), device=self.device)
        losses: list[Losses] = []
        routings: list[Routing] = []
        tokens = 0
        for micro in range(accumulate):
            batch, result = parts.forward(micro)
            value = result.total / accumulate
            total = total + value.detach()
            tokens += _tokens(batch, result)
            if keep_routings:
                routings += [routing.detach() for routing in result.routings]
            losses.append(_detached(result))
            last = micro == accumulate - 1
            if last:
                joined = self.world.joining(total, losses)
            self.world.before_backward(value, last).backward()
        self.world.collect(self.parameters)
        norm = self.world.norm(self.parameters)
        total, losses = joined()
        loss, grad_norm = torch.stack([total, norm.float()]).tolist()
        tokens *= self.world.count
        outcome = StepResult(loss, grad_norm, losses, tuple(routings), tokens)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            put_back(buffers)
            outcome.problem = self._diagnose(outcome, parts, indices)
            put_back(buffers)
        elif self.config.clip is not None:
            clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)
        return outcome

    def trial(self, step: int, samples_seen: int) -> None:
        """Run forward and backward of a step and undo it, to time it."""
        buffers = self._buffers()
        try:
            self(step, samples_seen, keep_routings=False)
        finally:
            put_back(buffers)
            for parameter in self.parameters.values():
                parameter.grad = None

    def _buffers(self) -> Buffers:
        """Copies, by name, of all that a forward pass may change besides gradients."""
        owners = [m for m in (self.model, self.objective) if isinstance(m, nn.Module)]
        return [(owner, {n: b.clone() for n, b in owner.named_buffers()}) for owner in owners]

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.source.get(indices)
        check_batch(batch, getattr(self.source, "name", type(self.source).__name__))
        return Batch(
            x=batch.x.to(self.device),
            cond=batch.cond.to(self.device),
            ids=batch.ids.to(self.device),
            targets=None if batch.targets is None else batch.targets.to(self.device),
        )

    def forward(self, model: Any, batch: Batch, step: int, micro: int) -> Losses:
        """The objective's losses; ``model`` None: of the trained model."""
        # Not torch.manual_seed: it formats a stack trace and visits every backend on each call.
        shared = derive(self.seed, "global", step, micro, *self.world.stream)
        torch.default_generator.manual_seed(shared)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(shared)
        rng = generator(self.seed, "train", step, 0)
        with autocast(self.device, self.dtype):
            return self.objective(model or self.forward_model, batch, rng, step / self.config.steps)

    def _diagnose(self, outcome: StepResult, parts: _Parts, indices: np.ndarray) -> dict[str, Any]:
        """What to log about a non-finite step: reason, first culprit, sample indices."""
        finite_loss = math.isfinite(outcome.loss)
        gradient = last_bad_gradient(self.parameters)
        alone = self.world.count == 1
        module = None
        for micro in range(self.config.accumulate):
            again = partial(parts.forward, micro, self.model)
            module = module or first_nonfinite(self.model, again, stop=alone)
        module, gradient = self.world.any_of([module, gradient])
        return {
            "reason": f"loss is {outcome.loss}" if not finite_loss else "gradient is not finite",
            "module": module,
            "gradient": gradient,
            "ids": [int(index) for index in indices],
        }


class _Parts:
    """The micro-batches of one step, each with the sums of all."""

    def __init__(
        self, owner: GradientStep, indices: np.ndarray, step: int, buffers: Buffers
    ) -> None:
        self._owner, self._step, self._buffers = owner, step, buffers
        own = owner.world.own
        count = owner.config.accumulate
        self._batches = [owner.batch(own(part)) for part in np.split(indices, count)]
        self._turns = Turns(count)
        if count > 1 and owner.sums:
            self._count()

    def forward(self, micro: int, model: Any = None) -> tuple[Batch, Losses]:
        """A micro-batch and what the objective answers to it; ``model``: not the compiled one."""
        batch = self._batches[micro]
        if len(self._batches) == 1:
            return batch, self._owner.forward(model, batch, self._step, 0)
        found = self._of_all(micro, model)
        if self._turns.asked and micro == 0:
            self._count()
            found = self._of_all(micro, model)
        if self._turns.asked:
            raise TrainingError("train.accumulate: not all micro-batches are summed alike")
        return batch, found

    def _of_all(self, micro: int, model: Any) -> Losses:
        with self._turns.part(micro):
            return self._run(micro, model)

    def _count(self) -> None:
        self._owner.sums = self._turns.count_first(self._run)

    def _run(self, micro: int, model: Any = None) -> Losses:
        put_back(self._buffers)  # every part finds, and leaves, what the whole batch would
        return self._owner.forward(model, self._batches[micro], self._step, micro)


def put_back(buffers: Buffers) -> None:
    for owner, before in buffers:
        # By name: a forward pass may have put another tensor in a buffer's place.
        for name, buffer in owner.named_buffers():
            buffer.detach().copy_(before[name])


def _tokens(batch: Batch, losses: Losses) -> int:
    if not batch.x.is_floating_point():
        return batch.x.numel()
    if losses.routings:
        samples, tokens = losses.routings[0].batch
        return samples * tokens
    return 0


def _detached(losses: Losses) -> Losses:
    """What the log needs, without the graph."""

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return Losses(
        main={name: value.detach() for name, value in losses.main.items()},
        aux=tuple(
            type(item)(item.name, item.value.detach(), item.weight, item.layer)
            for item in losses.aux
        ),
        per_sample=cut(losses.per_sample),
        noise=cut(losses.noise),
    )
