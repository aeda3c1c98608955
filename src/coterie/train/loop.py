"""The training loop, for any objective.

A run that is killed and started again has the same losses and weights as one that was never
interrupted, bit for bit (on the same machine, with the same numbers of threads, which
``step_threads`` keeps). Weights are never non-finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.core.errors import TrainingError
from coterie.core.threads import check_threads
from coterie.train.averages import Ema
from coterie.train.config import TrainConfig
from coterie.train.metrics_log import RunLog
from coterie.train.optimizer import build_optimizer, freeze, set_lr, trainable
from coterie.train.precision import resolve_device, resolve_precision
from coterie.train.progress import Progress, ProgressOption
from coterie.train.resume import RunStore
from coterie.train.run_directory import RunDir
from coterie.train.signals import Interrupted, StopSignals
from coterie.train.state import Parts, capture, restore
from coterie.train.step import GradientStep, StepResult
from coterie.train.threads import StepThreads
from coterie.train.world import ALONE, World

Callback = Callable[["Trainer", dict[str, Any]], None]


@dataclass
class TrainState:
    """Progress of training; saved with every checkpoint."""

    step: int = 0  # optimiser steps done, skipped ones included
    samples_seen: int = 0
    skipped: int = 0  # steps skipped for non-finite values
    skipped_in_a_row: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains ``model`` on ``source`` with ``objective``; calling it again resumes.

    The objective may be an ``nn.Module``: its parameters are trained with learning rate
    ``objective.lr`` (default: the configuration's) and no weight decay. A model with
    ``after_step(routings)`` gets the routings of all micro-batches after each optimiser step.
    ``run_dir`` None keeps everything in memory. ``run_config`` is the whole run's configuration
    (default: this one and the seed), written to ``config.json`` and checked by its hash on
    resuming.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        objective: Any,
        source: Any,
        seed: int = 0,
        run_dir: RunDir | Path | str | None = None,
        *,
        run_config: Mapping[str, Any] | None = None,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.dtype = resolve_precision(config.precision, self.device)
        self.model = model.to(self.device)
        self.objective = objective
        if isinstance(objective, nn.Module):
            objective.to(self.device)
        self.run_dir = RunDir(run_dir) if isinstance(run_dir, Path | str) else run_dir
        self.world = world
        self.frozen = freeze(model, config.freeze)
        world.distribute(model)
        parameters = trainable(model, objective)
        self.optimizer = build_optimizer(config, model, objective, parameters)
        self.parameters = world.local(parameters, self.optimizer)
        self.ema = Ema(model, config.ema, warmup=config.ema_warmup)
        self.parts = Parts(model, objective, self.optimizer, self.parameters, self.ema)
        self.state = TrainState()
        self.log = RunLog(config, self.device)
        self._gradients = GradientStep(
            config, model, objective, source, self.parameters,
            seed=seed, device=self.device, dtype=self.dtype, world=world,
        )  # fmt: skip
        self._store = RunStore(self.run_dir, self.parts, config, seed, run_config, world, source)

    def fit(
        self, progress: ProgressOption = True, callbacks: tuple[Callback, ...] = ()
    ) -> TrainState:
        """Train to ``config.steps``, from the newest checkpoint if there is one.

        TrainingError (non-finite values, locked or full disk), Interrupted (a signal, after a
        checkpoint was written), DataError (non-finite data), CheckpointError.
        """
        with ExitStack() as stack:
            stack.enter_context(own_threads_and_rng(self.config.threads, self.device))
            stack.enter_context(self.locked())
            self._resume()
            stack.enter_context(self.log.open(self._log_dir, self.state.step))
            shown = progress if self.world.is_first else False
            bar = Progress(shown, self.state.step, self.config.steps)
            stack.callback(bar.close)
            signals = stack.enter_context(StopSignals(patient=self.world.count > 1))
            self.world.watch(signals)
            threads = self._threads(bar)
            while self.state.step < self.config.steps:
                threads.before(self.state.step)
                begin = time.perf_counter()
                record = self.train_step()
                threads.after(time.perf_counter() - begin)
                bar.update(record)
                for callback in callbacks:
                    callback(self, record)
                self._after_record(record, signals)
            self.save()
        return self.state

    def begin(self) -> None:
        """Save the initial weights and an empty log, unless the run has begun."""
        if self.run_dir is None:
            return
        with self.locked():
            self._resume()
            if self.state.step == 0:
                with self.log.open(self._log_dir, 0):
                    self.save()

    def _threads(self, bar: Progress) -> StepThreads:
        def trial(step: int) -> None:
            self._begin_step()
            with self.world.sharing():
                self._gradients.trial(step, self.state.samples_seen)

        chooses = self.device.type == "cpu" and self.world.count == 1
        steps = self.config.steps
        return StepThreads(self.config.threads, self.run_dir, trial, chooses, bar.say, steps)

    @property
    def _log_dir(self) -> RunDir | None:
        return self.run_dir if self.world.is_first else None

    def locked(self) -> AbstractContextManager[object]:
        """Lock the run directory against other trainers."""
        if self.run_dir is None or not self.world.is_first:
            return nullcontext()
        return self.run_dir.lock()

    def project(self, steps: int = 5) -> float:
        """Estimated seconds for the rest of training, from a few timed steps that are undone."""
        before = {
            group: {name: value.detach().clone() for name, value in tensors.items()}
            for group, tensors in capture(self.parts).items()
        }
        position, updates, bins = asdict(self.state), self.ema.num_updates, self.log.bins.dump()
        with own_threads_and_rng(self.config.threads, self.device):
            self.train_step()  # the first step also pays for caches and compilation
            start = time.perf_counter()
            for _ in range(steps):
                self.train_step()
            seconds = (time.perf_counter() - start) / steps
        restore(self.parts, before, updates, "projection")
        self.state = TrainState(**position)
        self.log = RunLog(self.config, self.device)
        self.log.bins.load(bins)
        return seconds * (self.config.steps - self.state.step)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Inside the block the model has averaged weights (first decay); its own if there
        are none."""
        if not self.config.ema:
            yield self.model
            return
        with self.ema.swap(self.model):
            yield self.model

    def save(self) -> Path | None:
        """Write the checkpoint of the current step; None without a run directory."""
        self.log.sync()
        return self._store.save(
            self.state.step, {**asdict(self.state), "bins": self.log.bins.dump()}
        )

    def train_step(self) -> dict[str, Any]:
        """One optimiser step as in ``fit``; returns its log record."""
        with self.world.sharing():
            return self._step()

    def _step(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._begin_step()
        step = self.state.step
        lr = self.config.lr_at(step)
        hook = getattr(self.model, "after_step", None)
        wanted = hook is not None or self.log.is_due(step + 1)
        result = self._gradients(step, self.state.samples_seen, keep_routings=wanted)
        if not result.problem:
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._check_weights(step)
            if hook is not None:
                hook(result.routings)
            self.ema.update(self.model)
        self._advance(result, time.perf_counter() - start)
        return self.log.record(self.state.step, lr, result)

    def _begin_step(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.training = False
        if isinstance(self.objective, nn.Module):
            self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_weights(self, step: int) -> None:
        """TrainingError where a step has made a weight that is not finite; nothing is saved."""
        if self.world.count > 1:
            return  # the next step's loss tells all processes, and no checkpoint takes it
        held = [value.detach() for value in self.parameters.values()]
        largest = torch.stack(torch._foreach_norm(held, float("inf")))
        if not torch.isfinite(largest.max()):
            name = next(n for n, v in self.parameters.items() if not torch.isfinite(v).all())
            raise TrainingError(
                f"step {step + 1}: {name} is not finite after it; checkpoints saved before it are "
                "intact; lower train.lr"
            )

    def _advance(self, result: StepResult, seconds: float) -> None:
        self.state.step += 1
        self.state.samples_seen += self.config.batch
        self.state.seconds += seconds
        self.state.skipped += bool(result.problem)
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if result.problem else 0
        self.log.count(self.config.batch, result.tokens, seconds)

    def _after_record(self, record: dict[str, Any], signals: StopSignals) -> None:
        """Save or stop where this step asks for it."""
        if self.state.skipped_in_a_row >= self.config.nonfinite_limit:
            self.save()
            raise TrainingError(_why_stopped(self.state, record["skipped"]))
        received = self.world.stopped_by(signals)
        if received is not None:
            path = self.save()
            saved = f"saved {path}; the same command resumes" if path else "nothing was saved"
            raise Interrupted(received, f"after step {self.state.step}; {saved}")
        if self.state.step % self.config.checkpoint_every == 0:
            self.save()

    def _resume(self) -> None:
        scalars = self._store.resume()
        if scalars is not None:
            known = {name: scalars[name] for name in TrainState.__dataclass_fields__}
            # Whoever starts it again is told of a whole row of bad steps, not of one more.
            self.state = TrainState(**{**known, "skipped_in_a_row": 0})
            self.log.bins.load(scalars["bins"])


@contextmanager
def own_threads_and_rng(threads: int | None, device: torch.device) -> Iterator[None]:
    """Restore torch's number of threads and global generator after the block."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            check_threads(threads)
            torch.set_num_threads(threads)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


def _why_stopped(state: TrainState, problem: dict[str, Any]) -> str:
    return (
        f"step {state.step}: {problem['reason']} in {state.skipped_in_a_row} steps in a row, "
        f"first in {problem['module'] or problem['gradient']}; weights are as before those steps; "
        "lower train.lr, or set train.clip"
    )
