"""The processes that train one model: their groups, and the exchange of values."""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, CoterieError, TrainingError, describe
from coterie.core.share import Reduction, Share
from coterie.train.parallel.config import ParallelConfig

STORE = "COTERIE_STORE"
"""Environment: a file through which the processes of one machine meet; without it, the address
that torchrun sets."""
BEATS = "COTERIE_BEATS"
"""Environment: a folder where every process counts what it has said, for a supervisor to see."""

PULSE = 0.2  # s

_WORLD = ("data", "shard", "expert")
_GROUPS = (("data", "expert"), ("data", "shard"), ("data",), ("shard",), ("expert",))


class Beat:
    """Two counts that other processes can read: what this one has said, which a stop in its code
    ends, and a pulse, which ends when the process is stopped altogether."""

    def __init__(self, folder: str | None, rank: int) -> None:
        self._map: mmap.mmap | None = None
        self._count = 0
        if folder is not None:
            # Never shorter than it is mapped, should this process have it already.
            with (Path(folder) / f"rank-{rank}").open("ab+") as file:
                file.truncate(16)
                self._map = mmap.mmap(file.fileno(), 16)
            threading.Thread(target=self._pulse, daemon=True).start()

    def __call__(self) -> None:
        self._count += 1
        if self._map is not None:
            struct.pack_into("<Q", self._map, 0, self._count)

    def _pulse(self) -> None:
        count = 0
        while self._map is not None:
            count += 1
            struct.pack_into("<Q", self._map, 8, count)
            time.sleep(PULSE)


def read_beats(folder: Path, count: int) -> list[tuple[int, int]]:
    """(what it has said, its pulse) of each of ``count`` processes; zeros before it began."""
    paths = [folder / f"rank-{rank}" for rank in range(count)]
    data = [path.read_bytes() if path.is_file() else b"" for path in paths]
    return [struct.unpack("<QQ", value) if len(value) == 16 else (0, 0) for value in data]


class Processes:
    """This process among ``config.processes``.

    ``groups[axes]`` is the group of processes that differ along these axes only; None if that is
    this process alone.
    """

    def __init__(self, config: ParallelConfig, rank: int) -> None:
        import torch.distributed as dist

        self.config = config
        self.rank = rank
        self.count = config.processes
        self.place = config.place(rank)
        self.beat = Beat(os.environ.get(BEATS), rank)
        self.groups: dict[tuple[str, ...], Any] = {_WORLD: dist.group.WORLD}
        for axes in _GROUPS:
            members = config.groups(*axes)
            if len(members[0]) > 1:
                # Every process makes every group, in one order.
                made = [dist.new_group(ranks) for ranks in members]
                self.groups[axes] = next(g for g, m in zip(made, members) if rank in m)
        self.beat()

    @property
    def share(self) -> Share:
        """The part of every batch that is this process's."""
        return Share(self.rank, self.count, self.reduce)

    def reduce(
        self, values: Tensor, how: Reduction = "sum", axes: tuple[str, ...] = _WORLD
    ) -> Tensor:
        """``values`` added up, or the largest of them, over the group; in place."""
        import torch.distributed as dist

        group = self.groups.get(axes)
        if group is not None:
            self.beat()
            op = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
            dist.all_reduce(values, op, group)
        return values

    def reducing(self, values: Tensor, axes: tuple[str, ...]) -> Callable[[], object]:
        """Start to sum ``values`` over the group, in place; call the result to wait."""
        import torch.distributed as dist

        self.beat()
        wait: Callable[[], object]
        wait = dist.all_reduce(values, group=self.groups[axes], async_op=True).wait
        return wait

    def joined(self, values: Tensor, axes: tuple[str, ...] = _WORLD) -> Tensor:
        """The rows [R, ...] of every process of the group, of equal shapes, in order."""
        return self.joining(values, axes)()

    def joining(self, values: Tensor, axes: tuple[str, ...] = _WORLD) -> Callable[[], Tensor]:
        """As :meth:`joined`, but started only; call the result to wait."""
        import torch.distributed as dist

        group = self.groups.get(axes)
        if group is None:
            return lambda: values
        self.beat()
        out = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        work = dist.all_gather(out, values.contiguous(), group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return torch.cat(out)

        return wait

    def exchanging(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, Callable[[], object]]:
        """Send ``send[r]`` rows to each process r of the expert group and receive ``receive[r]``
        rows.

        Returns the received rows, and a function that waits for them.
        """
        import torch.distributed as dist

        self.beat()
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        group = self.groups[("expert",)]
        work = dist.all_to_all_single(
            out, rows.contiguous(), list(receive), list(send), group, async_op=True
        )
        return out, work.wait

    def told(self, value: Any) -> list[Any]:
        """A JSON value of every process, by rank."""
        text = json.dumps(value).encode()
        longest = int(self.reduce(torch.tensor([len(text)]), "max"))
        padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8)
        said = self.joined(padded).view(self.count, longest).tolist()
        return [json.loads(bytes(one)) for one in said]

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the first process only; all get its result (JSON), or its error."""
        answer: dict[str, Any] = {}
        error: CoterieError | None = None
        if self.rank == 0:
            try:
                answer = {"value": work()}
            except CoterieError as caught:
                error, answer = caught, {"error": str(caught)}
        answer = self.told(answer)[0]
        if error is not None:
            raise error
        if "error" in answer:
            raise TrainingError(f"the first process stopped: {answer['error']}")
        return answer["value"]


def launched() -> bool:
    """Whether this process is one of several that torchrun, or a supervisor, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(config: ParallelConfig, timeout: float = 600.0) -> Iterator[Processes]:
    """Connect to the other processes inside the block.

    ``timeout``: seconds that a process waits for another before it gives up.
    """
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count != config.processes:
        degrees = ",".join(f"{axis}={getattr(config, axis)}" for axis in config.axes)
        allowed = f"degrees whose product is {count}"
        hint = f"{count} processes were started"
        raise ConfigError(describe("parallel", degrees, allowed, hint))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_store(rank, count, limit),
        rank=rank,
        world_size=count,
        timeout=limit,
    )
    try:
        with warnings.catch_warnings():
            # A model's answer may be a view; nobody here writes into it.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield Processes(config, rank)
    finally:
        dist.destroy_process_group()


def _store(rank: int, count: int, timeout: timedelta) -> Any:
    """Where the processes meet: empty on every attempt, so that none finds a dead one's address."""
    import torch.distributed as dist

    path = os.environ.get(STORE)
    if path is not None:
        return dist.FileStore(path, count)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves it
    store = dist.TCPStore(host, port, count, rank == 0 and not theirs, timeout)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "run")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"coterie/{run}/{attempt}", store)
