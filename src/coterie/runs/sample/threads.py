"""The number of CPU threads for sampling: set by the user, or chosen by timing the first call.

The timed call is the first denoiser call of the draw, whose result is discarded. The number may
change between batches, if one was slow. Sums in torch may differ between numbers of threads, so
samples are recorded with theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from coterie.core.threads import Watch, asked, choose, most_threads, pays
from coterie.runs.judges import Judge
from coterie.runs.trained_run import LoadedRun
from coterie.train.threads import run_threads

FLAG = "--threads"


class _Enough(Exception):
    """The first call is over."""


class DrawThreads:
    """Chooses before a draw of ``num`` samples with ``options``, and again after a slow batch."""

    def __init__(self, judge: Judge, num: int, chooses: bool, **options: Any) -> None:
        self._judge, self._num, self._options = judge, num, options
        self._most = most_threads()
        self._chooses = chooses and self._most > 1
        self._watch: Watch | None = None
        self._numbers: list[int] = []
        settings = judge.run.config.sample
        index, seeds = options.get("index"), options.get("seeds")
        places = index or range(len(seeds or ()) or num)
        self._batches = sorted({place // settings.batch for place in places})
        each = settings.solver.evaluations_per_step() if self._chooses else None
        self._calls = (each or 1) * (options.get("steps") or settings.steps)
        self._choose()
        self._begin = time.perf_counter()

    def done(self) -> None:
        """A batch is drawn."""
        now = time.perf_counter()
        self._numbers.append(torch.get_num_threads())
        if self._watch is not None and self._watch.again(now - self._begin):
            self._choose()
        self._begin = time.perf_counter()

    def of(self, place: int) -> int:
        """The number that sample ``place`` of the draw was made with."""
        batch = place // self._judge.run.config.sample.batch
        if not self._numbers or batch not in self._batches:
            return torch.get_num_threads()
        return self._numbers[min(self._batches.index(batch), len(self._numbers) - 1)]

    def _choose(self) -> None:
        ahead = (len(self._batches) - len(self._numbers)) * self._calls
        if not self._chooses or not pays(self._most, ahead):
            return
        present = torch.get_num_threads()
        choice = choose(self._first_call, self._most, present, ahead=ahead)
        self._watch = Watch(choice, self._most, window=1)
        if not self._numbers or choice.threads != present:
            asked().say(choice.line("a call", FLAG))
        torch.set_num_threads(choice.threads)

    def _first_call(self) -> None:
        def stop(*_: Any) -> None:
            raise _Enough

        with suppress(_Enough):
            self._judge.draw(self._num, callback=stop, **self._options)


@contextmanager
def draw_threads(judge: Judge, num: int, **options: Any) -> Iterator[DrawThreads]:
    """Inside the block as many threads as a draw of ``num`` is best made with; ``options``: of it.

    Those asked for, else those that the run's configuration fixes, else chosen; where a draw is
    no walk that can be timed by its first call, those that the run was trained with in the end."""
    run = judge.run
    with run_threads(run.path, run.config.train.threads):
        fixed = asked().count or run.config.train.threads
        walks = judge.draws and type(judge).draw is Judge.draw and not run.is_text
        yield DrawThreads(judge, num, fixed is None and walks and _timed(run), **options)


def _timed(run: LoadedRun) -> bool:
    """Whether calls of a model say something: on a GPU, and compiled for one number, they do
    not."""
    model: Any = run.model
    if not isinstance(model, nn.Module):
        return True
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return not compiled and all(value.device.type == "cpu" for value in model.parameters())


def counted(threads: DrawThreads, progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """``progress`` of a draw, which tells ``threads`` of every batch."""

    def advance(count: int) -> None:
        if progress is not None:
            progress(count)
        threads.done()

    return advance
