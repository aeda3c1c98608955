"""Starts the processes of a run on this machine, and starts them again when one dies.

Each attempt meets in a file of its own, so that no process can find the address of a dead one, and
goes on from the last checkpoint. A process that says nothing while the others wait for it is named.
None outlives the supervisor.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from coterie.core.errors import ConfigError, TrainingError, describe
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.launch import child_processes
from coterie.runs.launch.worker import USER_ERROR
from coterie.train.batch_parts import routed_pools
from coterie.train.parallel.config import ParallelConfig
from coterie.train.parallel.exchange import check_enough
from coterie.train.parallel.processes import BEATS, STORE, read_beats
from coterie.train.parallel.spread import check_divides
from coterie.train.signals import Interrupted, StopSignals

POLL = 0.1  # s between looks at the processes
STARTUP = 300.0  # s to import, build a model and fetch its data, at least
PER_CORE = 4
"""Processes for each core of the machine: more of them mostly wait for each other."""
PLACE, OWNER = "coterie-processes-", "owner"
WORKER = "from coterie.runs.launch.worker import run; run()"
HUNG = 124
"""Exit code where a process stopped answering, as of timeout(1)."""


class Hung(TrainingError):
    """A process said nothing for too long."""

    exit_code = HUNG


def launch(
    config: RunConfig,
    out: str | Path,
    parallel: ParallelConfig,
    *,
    progress: bool = True,
    restarts: int = 3,
    timeout: float = 600.0,
    oversubscribe: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train ``config`` in processes of this machine; the same call again resumes, also with
    another layout.

    ``restarts``: how often all are started again after one has died. ``timeout``, s: how long a
    process may keep the others waiting. ``say`` gets a line for each new attempt. TrainingError
    with what a process complained of; Hung names the one that did not answer; Interrupted after a
    signal, when a checkpoint has been written. ConfigError, before anything is started, where the
    batch or the experts cannot be dealt out, or for more processes than the machine can serve
    (``oversubscribe``: start them all the same).
    """
    planned(config, parallel, oversubscribe)
    work = {
        "config": config.model_dump(mode="json"),
        "out": str(out),
        "parallel": parallel.model_dump(mode="json"),
        "progress": progress,
        "timeout": timeout
        + child_processes.GRACE,  # theirs is later: the supervisor knows who it was
    }
    for attempt in range(restarts + 1):
        trouble = run_processes(WORKER, work, parallel.processes, timeout)
        if trouble is None:
            return Path(out)
        if attempt < restarts:
            say(f"{trouble}; attempt {attempt + 2} goes on from the last checkpoint")
    raise TrainingError(f"{trouble}; gave up after {restarts + 1} attempts")


def planned(
    config: RunConfig, parallel: ParallelConfig, oversubscribe: bool = False
) -> dict[str, int]:
    """What :func:`launch` would start; ConfigError where it would refuse to."""
    count, cores = parallel.processes, os.cpu_count() or 1
    degrees = ",".join(f"{axis}={getattr(parallel, axis)}" for axis in parallel.axes)
    if count > PER_CORE * cores and not oversubscribe:
        allowed = f"at most {PER_CORE * cores} processes on {cores} cores"
        hint = f"this is {count}; --oversubscribe starts them all the same"
        raise ConfigError(describe("parallel", degrees, allowed, hint))
    part = config.train.batch // config.train.accumulate
    check_divides(part, count)
    if parallel.expert > 1 and config.train.steps:
        with torch.device("meta"):  # how many there are is all that is asked
            pools = routed_pools(build_model(config))
        for path, pool in pools.items():
            check_enough(path, pool.num_experts, parallel.expert)
    return {
        "processes": count,
        "samples_per_process": part // count,
        "threads_per_process": threads_of(count),
    }


def threads_of(count: int) -> int:
    """Of each of ``count`` processes, where the environment does not say."""
    return max(1, (os.cpu_count() or 1) // count)


def run_processes(code: str, work: dict[str, Any], count: int, timeout: float) -> str | None:
    """Start ``count`` processes that run the Python ``code`` with the path of a file that holds
    ``work``, and wait for them. None when all have done it, else who died."""
    with meeting_place() as folder:
        return _Attempt(folder, code, work, count, timeout).run()


@contextmanager
def meeting_place() -> Iterator[Path]:
    """A folder for what the processes tell each other, removed at the end, or by whoever comes here
    next where its owner was killed."""
    import fcntl

    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{PLACE}*"):
        with suppress(OSError):  # another user's, or somebody else removes it
            found = left.lstat()
            begun = time.time() - found.st_mtime > STARTUP  # its owner may not have got that far
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and begun:
                with (left / OWNER).open("rb") as file:  # ours have one
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=PLACE) as made,
        (Path(made) / OWNER).open("wb") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it, however we die
        yield Path(made)


class _Attempt:
    """All processes, once."""

    def __init__(
        self, folder: Path, code: str, work: dict[str, Any], count: int, timeout: float
    ) -> None:
        self.folder = folder
        self.code = code
        self.timeout = timeout
        self.count = count
        self.work = folder / "work.json"
        self.work.write_text(json.dumps(work), encoding="utf-8")
        self.processes: list[child_processes.Child] = []

    def run(self) -> str | None:
        """None when all have done their work, else who died and may be started again."""
        with StopSignals() as signals:
            try:
                self._start()
                return self._watch(signals)
            finally:
                child_processes.kill(self.processes)

    def _start(self) -> None:
        threads = str(threads_of(self.count))
        for rank in range(self.count):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.count),
                STORE: str(self.folder / "store"),
                BEATS: str(self.folder),
            }
            defaults = {"OMP_NUM_THREADS": threads}
            if sys.platform == "linux":
                defaults["GLOO_SOCKET_IFNAME"] = "lo"
            given = {name: os.environ.get(name, value) for name, value in defaults.items()}
            self.processes.append(
                child_processes.start(self.code, [str(self.work)], {**given, **own})
            )

    def _watch(self, signals: StopSignals) -> str | None:
        said, since = [0] * self.count, time.monotonic()
        alive = [(0, since)] * self.count  # the last pulse, and when it was seen
        while True:
            codes = [process.poll() for process in self.processes]
            if signals.received is not None:
                self._interrupt(signals.received)
            if all(code == 0 for code in codes):
                return None
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                return self._failed(failed[0])
            now, beats = time.monotonic(), read_beats(self.folder, self.count)
            alive = [
                before if pulse == before[0] else (pulse, now)
                for before, (_, pulse) in zip(alive, beats)
            ]
            if [beat for beat, _ in beats] != said:
                said, since = [beat for beat, _ in beats], now
            limit = self.timeout if all(said) else max(self.timeout, STARTUP)
            if now - since > limit:
                stopped = [rank for rank, (_, seen) in enumerate(alive) if now - seen > limit / 2]
                raise self._hung(stopped or [r for r in range(self.count) if said[r] == min(said)])
            time.sleep(POLL)

    def _hung(self, ranks: list[int]) -> Hung:
        """``ranks``: those without a pulse; if all have one, those that have said least."""
        return Hung(
            f"process {', '.join(map(str, ranks))} of {self.count} did not answer for "
            f"{self.timeout:.0f} s; all were stopped; the same command resumes"
        )

    def _failed(self, rank: int) -> str:
        """Why a process ended; raises what another attempt would meet again."""
        time.sleep(1.0)  # the one that stumbled first may not be the one seen first
        codes = {r: p.poll() for r, p in enumerate(self.processes)}
        for other, code in codes.items():
            complaint = self.folder / f"error-{other}"
            if code == USER_ERROR and complaint.is_file():
                raise TrainingError(complaint.read_text(encoding="utf-8"))
        killed = [r for r, code in codes.items() if code is not None and code < 0]
        rank = killed[0] if killed else rank
        code = codes[rank]
        assert code is not None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"process {rank} of {self.count} {how}"

    def _interrupt(self, number: int) -> None:
        """Pass a signal on; the processes agree on a step, save and stop."""
        child_processes.pass_on(number, self.processes)
        complaint = self.folder / "error-0"
        text = complaint.read_text(encoding="utf-8") if complaint.is_file() else ""
        where = text.partition("; ")[2] or "no checkpoint was written; the last one stands"
        raise Interrupted(number, where)
