"""The processes of a training run: one, or (:mod:`coterie.train.parallel`) several.

The loop works on the part of batch, parameters and optimiser state that this process holds, and
calls the world for everything that concerns the whole. With one process these calls do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from coterie.core.batch import Losses
from coterie.train import checkpoint
from coterie.train.checkpoint import Checkpoint
from coterie.train.optimizer import gradient_norm
from coterie.train.signals import StopSignals

Groups = dict[str, dict[str, Tensor]]


class World:
    """A run in one process."""

    is_first = True
    """Whether this process writes logs, checkpoints and progress."""
    count = 1
    """Parts of the batch."""
    stream: tuple[int, ...] = ()
    """What tells this process's global random numbers from those of others."""

    def distribute(self, model: nn.Module) -> None:
        """Keep in ``model`` only this process's part; ConfigError if it cannot be split."""

    def local(
        self, parameters: dict[str, nn.Parameter], optimizer: Optimizer
    ) -> dict[str, nn.Parameter]:
        """This process's part of the parameters, by name; the optimiser updates these."""
        return parameters

    def watch(self, signals: StopSignals) -> None:
        """Start to exchange signals at every step."""

    def sharing(self) -> AbstractContextManager[None]:
        """A context for everything that reads a batch."""
        return nullcontext()

    def own(self, indices: np.ndarray) -> np.ndarray:
        """This process's samples among those of a micro-batch."""
        return indices

    def before_backward(self, loss: Tensor, last: bool) -> Tensor:
        """The loss to differentiate; ``last``: gradients are complete after it."""
        return loss

    def collect(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Turn this process's gradients into those of the whole batch."""

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Norm of all gradients, over all processes."""
        return gradient_norm(parameters.values())

    def joining(
        self, total: Tensor, losses: list[Losses]
    ) -> Callable[[], tuple[Tensor, list[Losses]]]:
        """Called after the last backward pass; returns the loss of the whole batch and its parts,
        detached."""
        return lambda: (total, losses)

    def any_of(self, names: Iterable[str | None]) -> list[str | None]:
        """Each name, or, where it is None, that of another process."""
        return list(names)

    def stopped_by(self, signals: StopSignals) -> int | None:
        """The signal that any process received in the last step; equal in all."""
        return signals.received

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the first process only; all get its result (JSON)."""
        return work()

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in every process, in the first one first."""
        return work()

    def newest(self, run: Path, config_hash: str) -> Checkpoint | None:
        """The newest checkpoint, with whole tensors."""
        return checkpoint.load_latest(run, config_hash)

    def whole(self, state: Groups) -> Mapping[str, Mapping[str, Tensor]]:
        """A checkpoint's whole tensors, from the parts of all processes; only the first
        gets them."""
        return state

    def part(self, state: Groups) -> Groups:
        """Inverse of :meth:`whole`: what this process holds of a checkpoint."""
        return state


ALONE = World()
