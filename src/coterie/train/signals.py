"""Ctrl-C and termination: finish the step, save, then stop with the usual exit code."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from coterie.core.errors import TrainingError


class Interrupted(TrainingError):
    """Training was stopped by a signal; the command line exits with ``exit_code``."""

    def __init__(self, signum: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where}")
        self.exit_code = 128 + signum


class StopSignals:
    """Inside the block the first SIGINT or SIGTERM only sets ``received``; the second exits.

    ``patient``: later ones are ignored too, for launchers that pass signals on to processes which
    also get them from the terminal.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only, and only it may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and not self.patient:
            os._exit(128 + number)
        self.received = number
