"""Time and memory of calls on a device: events of the device itself, candidates interleaved.

On CUDA a buffer larger than the L2 cache is overwritten before every call, so that each finds a
cold cache (as in a model, where other layers came between) and its first launches are queued.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coterie.bench.timing import Times

_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any device
_FEWEST = 3


@dataclass(frozen=True)
class Clock:
    """``repeats`` of each candidate after ``warmups``, or as many as fit into ``seconds``."""

    device: str
    repeats: int = 100
    warmups: int = 20
    seconds: float = 15.0

    def times(self, calls: Mapping[str, Callable[[], Any]]) -> Times:
        """Seconds per call of each candidate in every round."""
        for call in calls.values():
            for _ in range(self.warmups):
                call()
        self.wait()
        times: Times = {name: [] for name in calls}
        began = time.perf_counter()
        for turn in range(self.repeats):
            if turn >= _FEWEST and time.perf_counter() - began > self.seconds:
                break
            for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
                times[name].append(self.once(calls[name]))
        return times

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self.device == "cpu":
            start = time.process_time()
            call()
            return time.process_time() - start
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device).zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def memory(
        self, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]
    ) -> dict[str, float | None]:
        """MiB kept from the forward for the backward, with the output, and the most in use at once,
        both beyond what was there before; None on a CPU."""
        if self.device == "cpu":
            return {"saved_mib": None, "peak_mib": None}
        gc.collect()
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = forward()
        kept = torch.cuda.memory_allocated() - before
        backward(y)
        self.wait()
        most = torch.cuda.max_memory_allocated() - before
        return {"saved_mib": round(kept / 2**20, 1), "peak_mib": round(most / 2**20, 1)}
