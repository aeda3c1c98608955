"""The number of CPU threads of a training run, chosen by timing steps and saved with the run.

Sums in torch may differ between numbers of threads, so a run is reproducible bit for bit only with
the same numbers at the same steps. ``threads.json`` lists them as ``[step, number]``, each written
before its first step. A run that is resumed before such a step changes there again. The timed work
is the gradient of the next step, which is discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from coterie.core.errors import ConfigError, describe
from coterie.core.json_reader import read_object
from coterie.core.threads import (
    Choice,
    Watch,
    asked,
    check_threads,
    choose,
    most_threads,
    threads,
)
from coterie.train.run_directory import RunDir

FILE = "threads.json"
Say = Callable[[str], None]


class StepThreads:
    """Sets the number of threads before each of ``steps`` steps; ``fixed``: always this number."""

    def __init__(
        self,
        fixed: int | None,
        run_dir: RunDir | None,
        probe: Callable[[int], Any],
        chooses: bool = True,
        say: Say = lambda line: None,
        steps: int | None = None,
    ) -> None:
        fixed = asked().count or fixed
        if fixed is not None:
            check_threads(fixed)
        self._fixed, self._run_dir, self._probe, self._say = fixed, run_dir, probe, say
        self._most, self._steps = most_threads(), steps
        self._chooses = chooses and fixed is None and self._most > 1
        self._known = read_threads(run_dir) if self._chooses else []
        self._watch: Watch | None = None
        self._now: int | None = None
        self._ask = False

    def before(self, step: int) -> None:
        """Set the number of threads for step ``step`` (from 0)."""
        if self._fixed is not None:
            torch.set_num_threads(self._fixed)
        if not self._chooses:
            return
        due = [count for at, count in self._known if at <= step]
        ahead = any(at > step for at, _ in self._known)
        if due and due[-1] != self._now:
            self._use(due[-1])
        if ahead:
            self._ask = False
            return  # as it was made before
        if self._now is None or self._ask:
            self._choose(step)

    def after(self, seconds: float) -> None:
        """Record the duration of the step."""
        if self._chooses:
            if self._watch is None and self._now is not None:
                self._watch = Watch(Choice(self._now, {}, 0.5), self._most)
            self._ask = self._watch is not None and self._watch.again(seconds)

    def _choose(self, step: int) -> None:
        ahead = None if self._steps is None else self._steps - step
        choice = choose(lambda: self._probe(step), self._most, self._now, ahead=ahead)
        self._watch, self._ask = Watch(choice, self._most), False
        if choice.threads != self._now:
            self._known = [*(one for one in self._known if one[0] < step), (step, choice.threads)]
            if self._run_dir is not None:
                self._run_dir.write_json(FILE, {"threads": self._known})
            self._say(choice.line("a step", "--train.threads"))
        self._use(choice.threads)

    def _use(self, count: int) -> None:
        self._now = count
        torch.set_num_threads(count)


def read_threads(run_dir: RunDir | None) -> list[tuple[int, int]]:
    """(first step, threads) of every number that a run used; [] for a new run."""
    path = None if run_dir is None else run_dir.path / FILE
    if path is None or not path.is_file():
        return []
    allowed = "threads: [[step, number], ...], as training writes it"
    data: Any = read_object(path, error=ConfigError).get("threads")
    try:
        found = [(int(step), int(count)) for step, count in list(data)]
    except (ValueError, TypeError):
        raise ConfigError(describe(str(path), "another content", allowed)) from None
    if found != sorted(found) or any(step < 0 for step, _ in found):
        raise ConfigError(describe(str(path), found[:4], allowed))
    for _, count in found:
        check_threads(count, str(path))
    return found


def run_threads(path: str | Path, fixed: int | None) -> AbstractContextManager[None]:
    """Inside the block use the number of threads that the run at ``path`` ended with, so that its
    samples are reproducible; unchanged if none was chosen or fixed."""
    known = read_threads(RunDir(path))
    return threads(asked().count or fixed or (min(known[-1][1], most_threads()) if known else None))
