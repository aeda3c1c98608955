"""The metrics of a run: loss of every step, more on log steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from coterie.core.errors import ConfigError, describe
from coterie.train.config import TrainConfig
from coterie.train.run_directory import MetricsLog, RunDir
from coterie.train.step import StepResult
from coterie.train.step_metrics import NoiseBins, average, expert_load, memory_mb, scalars


class RunLog:
    """Makes log records and writes them to ``metrics.jsonl`` (and TensorBoard) while open.

    A record has ``step`` (1-based), ``loss`` (full precision; null if not finite), ``grad_norm``
    and ``lr``; on log steps also ``losses``, ``aux``, ``noise_bins``, ``experts`` and ``machine``;
    of a skipped step ``skipped``. All but ``machine`` are the same in a resumed run.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.bins = NoiseBins(config.num_bins)
        self._file: MetricsLog | None = None
        self._board: Any = None
        self._samples = self._tokens = 0
        self._seconds = 0.0

    def is_due(self, step: int) -> bool:
        return step in (1, self.config.steps) or step % self.config.log_every == 0

    @contextmanager
    def open(self, run_dir: RunDir | None, step: int) -> Iterator[None]:
        """Write to ``run_dir`` inside the block, going on after ``step``."""
        if run_dir is None:
            yield
            return
        if self.config.tensorboard:
            self._board = _tensorboard(run_dir, step)
        self._file = MetricsLog(run_dir.metrics_path, step)
        try:
            yield
        finally:
            file, self._file = self._file, None
            board, self._board = self._board, None
            if board is not None:
                board.close()
            file.close()

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def count(self, samples: int, tokens: int, seconds: float) -> None:
        self._samples += samples
        self._tokens += tokens
        self._seconds += seconds

    def record(self, step: int, lr: float, result: StepResult) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": step,
            "loss": _number(result.loss),
            "grad_norm": _number(result.grad_norm),
            "lr": lr,
        }
        if result.problem:
            record["skipped"] = result.problem
        else:
            for losses in result.losses:
                if losses.per_sample is not None and losses.noise is not None:
                    self.bins.add(losses.noise, losses.per_sample)
        if self.is_due(step):
            record.update(self._details(result))
        if self._file is not None:
            self._file.write(record, flush=self.is_due(step) or bool(result.problem))
        if self._board is not None:
            for name, value in scalars(record):
                self._board.add_scalar(name, value, step)
        return record

    def _details(self, result: StepResult) -> dict[str, Any]:
        details: dict[str, Any] = {} if result.problem else dict(average(result.losses))
        details["noise_bins"] = self.bins.means()
        if result.routings and not result.problem:
            details["experts"] = expert_load(result.routings)
        details["machine"] = self._machine()
        self.bins.reset()
        return details

    def _machine(self) -> dict[str, float]:
        """Speed since the last log, and peak memory."""
        seconds = max(self._seconds, 1e-9)
        out = {
            "samples_per_second": self._samples / seconds,
            "memory_mb": memory_mb(self.device),
        }
        if self._tokens:
            out["tokens_per_second"] = self._tokens / seconds
        self._samples = self._tokens = 0
        self._seconds = 0.0
        return out


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensorboard(run_dir: RunDir, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        hint = "pip install 'coterie[track]'"
        raise ConfigError(
            describe("train.tensorboard", True, "false: tensorboard is not installed", hint)
        ) from None
    return SummaryWriter(str(run_dir.path / "tensorboard"), purge_step=step + 1)
