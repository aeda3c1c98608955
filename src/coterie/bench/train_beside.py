"""Training alone and beside busy processes: what choosing the number of threads is worth.

Every round trains the same few seconds alone and beside, with the number of threads chosen and
with each fixed one, so that a drift of the machine meets all of them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from coterie.bench.goals import goal
from coterie.core.threads import candidates, most_threads
from coterie.recipes.dit_moe import arms
from coterie.runs.build import build_model, build_source
from coterie.train.loop import Trainer

CHOSEN = "chosen"
BUSY = """
import os, sys
parent = int(sys.argv[1])
while os.getppid() == parent:
    for _ in range(200_000):
        pass
"""
"""Keeps a core busy until its parent is gone, however that ended."""


class _Enough(Exception):
    """The time is over."""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """``count`` processes that do nothing but work, inside the block."""
    command = [sys.executable, "-S", "-c", BUSY, str(os.getpid())]
    started = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def samples_per_second(threads: int | None, seconds: float) -> float:
    """Of a run that begins anew and goes on for so long, with every choice but the first: that and
    the first step pay for caches."""
    config = arms()["moe"]
    settings = config.train.replace(threads=threads, steps=10**9, warmup=0)
    model = build_model(config)
    trainer = Trainer(settings, model, config.objective.build(model), build_source(config), 0)
    times: list[float] = []

    def stop(_: Trainer, record: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        if times[-1] - times[0] > seconds:
            raise _Enough

    with suppress(_Enough):
        trainer.fit(False, (stop,))
    return config.train.batch * (len(times) - 1) / (times[-1] - times[0])


def run_beside(count: int, rounds: int = 3, seconds: float = 10.0) -> dict[str, Any]:
    """``rows`` {threads, alone, beside} in samples per second, medians; ``goals``."""
    tried: dict[str, int | None] = {CHOSEN: None}
    tried |= {str(number): number for number in candidates(most_threads())}
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in tried}
    for _ in range(rounds):
        for name, threads in tried.items():
            found[name]["alone"].append(samples_per_second(threads, seconds))
        with busy_processes(count):
            for name, threads in tried.items():
                found[name]["beside"].append(samples_per_second(threads, seconds))
    rows: list[dict[str, Any]] = [
        {
            "threads": name,
            **{where: round(statistics.median(each), 1) for where, each in values.items()},
        }
        for name, values in found.items()
    ]
    best = {where: max(row[where] for row in rows[1:]) for where in ("alone", "beside")}
    kept = rows[0]["beside"] / rows[0]["alone"]
    lost = {where: rows[0][where] / best[where] for where in best}
    name = f"training beside {count} busy: of the speed alone"
    return {
        "beside": count,
        "rows": rows,
        "goals": [
            goal("threads", name, kept, 0.7, at_most=False),
            *(
                goal(
                    "threads",
                    f"chosen, of the best fixed number {where}",
                    part,
                    0.95,
                    at_most=False,
                )
                for where, part in lost.items()
            ),
        ],
    }
