"""Time training steps in several processes, beside one process and torch's own data parallelism.

Two processes of this machine train the same model in turns under every layout; what a step sends is
read off the loopback interface, the same way for all. The peer (``DistributedDataParallel``) steps
the same model with the same objective on its half of the batch. It does less: noise of its own, a
balance loss of its half alone (so its processes meet once a step, ours twice), no check of batch
and loss, no logs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coterie.bench.goals import timed
from coterie.bench.timing import ratio
from coterie.core.errors import TrainingError
from coterie.core.json_reader import read_object
from coterie.core.rng import generator
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.launch.supervisor import run_processes
from coterie.train.config import TrainConfig
from coterie.train.loop import Trainer
from coterie.train.parallel import ParallelConfig, Processes, Spread, joined
from coterie.train.world import ALONE, World

ONE = "one process"
PEER = "DistributedDataParallel"
TIMEOUT = 300.0  # s
WORKER = """
from coterie.bench.parallel import work
from coterie.runs.launch.worker import run
run(work)
"""
COUNTERS = Path("/proc/net/dev")

Step = Callable[[], Any]


def run_benchmark(
    config: RunConfig, processes: int = 2, rounds: int = 20, threads: int = 1
) -> dict[str, Any]:
    """``goals``, and ``rows`` {layout, processes, step_ms, steps_per_second, vs_one, vs_peer,
    cpu_ms, wire_bytes}.

    ``vs_one``, ``vs_peer``: time of a step over that of one process with the whole batch, and over
    the peer's, median of the ratios within a round. ``cpu_ms``: processor time of the first
    process, which waiting for others and for the machine does not enter. ``wire_bytes``: of one
    step, all processes together; None where it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
        out = Path(folder) / "times.json"
        work = {
            "config": config.model_dump(mode="json"),
            "processes": processes,
            "rounds": rounds,
            "threads": threads,
            "out": str(out),
        }
        trouble = run_processes(WORKER, work, processes, TIMEOUT)
        if trouble is not None:
            raise TrainingError(f"bench parallel: {trouble}")
        measured = read_object(out)
    times = {name: found["seconds"] for name, found in measured.items()}
    what = f"{config.recipe or 'run'} in {processes} processes: step, over {PEER}"
    return {
        "rows": [_row(name, measured, processes) for name in measured],
        "goals": [timed("parallel", what, times, f"data={processes}", [PEER], 1.05)],
    }


def work(task: dict[str, Any]) -> None:
    """What every process does; the first writes the times."""
    torch.set_num_threads(task["threads"])
    count = task["processes"]
    config = RunConfig.model_validate(task["config"])
    with joined(ParallelConfig(data=count), TIMEOUT) as world:
        steps: dict[str, Step] = {ONE: _trained(config, ALONE) if world.rank == 0 else _nothing}
        for axis in ParallelConfig.axes:
            laid_out = Processes(ParallelConfig(**{axis: count}), world.rank)
            steps[f"{axis}={count}"] = _trained(config, Spread(laid_out))
        steps[PEER] = _peer(config, world)
        measured = _measure(steps, world, task["rounds"])
        if world.rank == 0:
            Path(task["out"]).write_text(json.dumps(measured), encoding="utf-8")


def _nothing() -> None:
    """One process works, the others wait."""


def _settings(config: RunConfig) -> TrainConfig:
    """Without averages, which are everybody's own, and without logs and checkpoints."""
    return config.train.replace(ema=(), log_every=10**9, steps=10**9, warmup=0)


def _trained(config: RunConfig, world: World) -> Step:
    model = build_model(config)
    objective = config.objective.build(model)
    source = build_source(config)
    trainer = Trainer(_settings(config), model, objective, source, world=world)
    return trainer.train_step


def _peer(config: RunConfig, world: Processes) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model, train, source = build_model(config).train(), _settings(config), build_source(config)
    wrapped = DistributedDataParallel(model)
    objective = config.objective.build(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, fused=True)
    own = train.batch // world.count
    rng = generator(world.rank, "bench")
    position = 0

    class Asked:
        """The model as an objective calls it."""

        mask_token = getattr(model, "mask_token", None)
        aux_losses = staticmethod(model.aux_losses)
        __call__ = staticmethod(wrapped.__call__)

    def step() -> None:
        nonlocal position
        optimizer.zero_grad(set_to_none=True)
        batch = source.get(torch.arange(position, position + own).numpy() % len(source))
        objective(Asked(), batch, rng, 0.0).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip or 1.0)
        optimizer.step()
        position += own

    return step


def _measure(steps: dict[str, Step], world: Processes, rounds: int) -> dict[str, Any]:
    """Seconds and bytes per step of each layout, in every round, back and forth."""
    repeats = {}
    for name, step in steps.items():
        step()
        world.told(None)
        start = time.perf_counter()
        step()
        seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        repeats[name] = max(2, min(20, int(0.5 / float(world.reduce(seconds, "max")))))
    measured: dict[str, Any] = {name: {"seconds": [], "cpu": [], "bytes": []} for name in steps}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            world.told(None)
            start, busy, before = time.perf_counter(), time.process_time(), _wire_bytes()
            for _ in range(repeats[name]):
                steps[name]()
            world.told(None)  # a few hundred bytes
            seconds, after = torch.tensor([time.perf_counter() - start]), _wire_bytes()
            measured[name]["seconds"].append(float(seconds) / repeats[name])
            measured[name]["cpu"].append((time.process_time() - busy) / repeats[name])
            if before is not None and after is not None:
                measured[name]["bytes"].append((after - before) // repeats[name])
    return measured


def _wire_bytes() -> int | None:
    """Bytes that have passed the loopback interface, over which processes of a machine talk."""
    if os.environ.get("GLOO_SOCKET_IFNAME") != "lo" or not COUNTERS.is_file():
        return None
    lines = COUNTERS.read_text(encoding="ascii").splitlines()
    found = [line.split(":", 1)[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(found[0][8]) if found else None


def _row(name: str, measured: dict[str, Any], processes: int) -> dict[str, Any]:
    times = {layout: found["seconds"] for layout, found in measured.items()}
    step, sent = statistics.median(times[name]), measured[name]["bytes"]
    return {
        "layout": name,
        "processes": 1 if name == ONE else processes,
        "step_ms": round(1e3 * step, 2),
        "steps_per_second": round(1 / step, 2),
        "vs_one": ratio(times, name, [ONE]),
        "vs_peer": ratio(times, name, [PEER]),
        "cpu_ms": round(1e3 * statistics.median(measured[name]["cpu"]), 2),
        "wire_bytes": int(statistics.median(sent)) if sent and name != ONE else None,
    }
