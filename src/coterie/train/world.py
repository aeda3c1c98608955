"""Where a training run lives: in one process, or (:mod:`coterie.train.parallel`) in several.

The loop computes with what this process holds of the batch, the parameters and the optimiser's
state, and asks the world for whatever concerns the whole. In one process nothing does.
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
    """One process, which holds everything."""

    is_first = True
    """Whether this process writes logs, checkpoints and progress."""
    count = 1
    """Parts of the batch."""
    stream: tuple[int, ...] = ()
    """What tells this process's global random numbers from those of others."""

    def distribute(self, model: nn.Module) -> None:
        """Leave in ``model`` what this process holds of it; ConfigError where it cannot be cut."""

    def local(
        self, parameters: dict[str, nn.Parameter], optimizer: Optimizer
    ) -> dict[str, nn.Parameter]:
        """What this process holds of the parameters, by name; the optimiser steps these."""
        return parameters

    def watch(self, signals: StopSignals) -> None:
        """From here on signals are asked for, step by step."""

    def sharing(self) -> AbstractContextManager[None]:
        """Around everything that reads a batch."""
        return nullcontext()

    def own(self, indices: np.ndarray) -> np.ndarray:
        """This process's samples among those of a micro-batch."""
        return indices

    def before_backward(self, loss: Tensor, last: bool) -> Tensor:
        """The loss to go back from; ``last``: gradients are complete after it."""
        return loss

    def collect(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the gradients those of the whole batch."""

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Total norm of all gradients, wherever they are."""
        return gradient_norm(parameters.values())

    def joining(
        self, total: Tensor, losses: list[Losses]
    ) -> Callable[[], tuple[Tensor, list[Losses]]]:
        """Asked after the last backward pass: the loss, and its detached parts, of the batch."""
        return lambda: (total, losses)

    def any_of(self, names: Iterable[str | None]) -> list[str | None]:
        """Each name, or what another process found where this one found none."""
        return list(names)

    def stopped_by(self, signals: StopSignals) -> int | None:
        """The signal that any process had received in the last step; the same in all."""
        return signals.received

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` answers (JSON), done by one process for all."""
        return work()

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """``work`` done by every process, by the first before the others."""
        return work()

    def newest(self, run: Path, config_hash: str) -> Checkpoint | None:
        """The newest checkpoint, in full."""
        return checkpoint.load_latest(run, config_hash)

    def whole(self, state: Groups) -> Mapping[str, Mapping[str, Tensor]]:
        """A checkpoint's tensors from what the processes hold; only the first gets them."""
        return state

    def part(self, state: Groups) -> Groups:
        """Inverse of :meth:`whole`: what this process holds of a checkpoint."""
        return state


ALONE = World()
