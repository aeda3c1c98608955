"""Parts of one batch in threads that wait for each other: processes without processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.share import Share, sharing
from coterie.train.parallel import ParallelConfig, Processes, joined
from coterie.train.parallel.processes import STORE

FORK = multiprocessing.get_context("fork")


class Threads:
    """What one of ``count`` threads says to the others; enough of ``Processes`` for experts."""

    def __init__(self, config: ParallelConfig, rank: int, box: list[Any], barrier: Any) -> None:
        self.config = config
        self.rank = rank
        self.place = config.place(rank)
        self.groups = {config.axes: "all"}
        self._box, self._barrier = box, barrier

    def said(self, value: Any) -> list[Any]:
        """What every thread says, by rank."""
        self._box[self.rank] = value
        self._barrier.wait(60)
        everything = list(self._box)
        self._barrier.wait(60)
        return everything

    def reduce(self, values: Tensor, how: str = "sum") -> Tensor:
        stacked = torch.stack(self.said(values.clone()))
        return values.copy_(stacked.sum(0) if how == "sum" else stacked.amax(0))

    def reducing(self, values: Tensor, axes: tuple[str, ...]) -> Callable[[], Tensor]:
        assert axes in self.groups
        said = values.clone()
        return lambda: values.copy_(torch.stack(self.said(said)).sum(0))

    def joining(self, values: Tensor, axes: tuple[str, ...] = ()) -> Callable[[], Tensor]:
        said = values.clone()
        return lambda: torch.cat(self.said(said))

    def exchanging(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, Callable[[], None]]:
        assert sum(send) == len(rows)
        parts = [theirs[self.rank] for theirs in self.said(rows.split(list(send)))]
        assert [len(part) for part in parts] == list(receive)
        out = torch.full_like(torch.cat(parts), -1)  # not to be read before it has been waited for
        return out, lambda: out.copy_(torch.cat(parts))


def in_threads(count: int, work: Callable[[Threads], Any]) -> list[Any]:
    """``work`` by ``count`` threads that share batches; what each answers."""
    barrier = threading.Barrier(count)
    box: list[Any] = [None] * count
    answers: list[Any] = [None] * count
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        thread = Threads(ParallelConfig(expert=count), rank, box, barrier)
        try:
            with sharing(Share(rank, count, thread.reduce)):
                answers[rank] = work(thread)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # shown by the test, not by the thread
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return answers


def in_processes(
    folder: Path, count: int, work: Callable[[Callable[..., Processes]], None]
) -> None:
    """``work`` in ``count`` forked processes, each given a function that lays them out by degrees;
    AssertionError with what went wrong in any of them."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(rank: int) -> None:
        own = {"RANK": rank, "WORLD_SIZE": count, STORE: folder / "store"}
        os.environ.update({name: str(value) for name, value in own.items()})
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        code = 1
        try:
            with joined(ParallelConfig(data=count), timeout=60):
                work(lambda **degrees: Processes(ParallelConfig(**degrees), rank))
            code = 0
        except BaseException:
            (folder / f"error-{rank}").write_text(traceback.format_exc())
        finally:
            os._exit(code)

    running = [FORK.Process(target=one, args=(rank,)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(240)
    said = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not said, "\n".join(said)
    assert [process.exitcode for process in running] == [0] * count
