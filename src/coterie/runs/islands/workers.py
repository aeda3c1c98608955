"""Training islands in parallel, each in its own process, with progress."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, TrainingError, describe
from coterie.core.folder import open_own, write_text
from coterie.runs.config import RunConfig
from coterie.runs.islands.plan import IslandPlan, read_plan
from coterie.runs.launch import child_processes
from coterie.runs.training import start
from coterie.train import checkpoint
from coterie.train.run_directory import RunDir, read_metrics
from coterie.train.signals import Interrupted, StopSignals

POLL = 0.2  # seconds between looks at running islands


def run_island(folder: str | Path, index: int | str, progress: bool = True) -> Path:
    """Train one island; the same call again resumes. Nothing outside its folder is written."""
    entry = entry_of(read_plan(folder), int(index))
    run = RunDir(Path(folder) / entry.folder)
    return start(run.read_config(RunConfig), run.path, progress=progress)


def run_all(
    folder: str | Path, jobs: int = 1, progress: Callable[[str, int, int], None] | None = None
) -> list[Path]:
    """Train every island, ``jobs`` at a time, each in a process of its own.

    What a process says goes to ``island-k.log`` in the plan. An island that fails does not stop the
    others; TrainingError names all that failed. A signal is passed on to those that train, which
    save and stop (Interrupted); none goes on when this process is killed.
    """
    if jobs < 1:
        raise ConfigError(describe("jobs", jobs, "1 or more"))
    folder, plan = Path(folder), read_plan(folder)
    left = [entry.index for entry in plan.islands]
    running: dict[int, child_processes.Child] = {}
    failed: dict[int, str] = {}
    done = 0
    with StopSignals() as signals:
        try:
            while left or running:
                while left and len(running) < jobs:
                    index = left.pop(0)
                    running[index] = _spawn(folder, index)
                index, process = _first_done(running, signals)
                del running[index]
                if process.returncode:
                    said = _log(folder, index).read_text(encoding="utf-8", errors="replace")
                    failed[index] = (said.strip().splitlines() or ["no message"])[-1]
                done += 1
                if progress is not None:
                    progress(f"island {index}", done, len(plan.islands))
        finally:
            child_processes.kill(list(running.values()))
    if failed:
        told = "; ".join(f"island {index}: {why}" for index, why in sorted(failed.items()))
        raise TrainingError(f"{folder}: {len(failed)} of {len(plan.islands)} failed: {told}")
    return [folder / entry.folder for entry in plan.islands]


def status(folder: str | Path) -> list[dict[str, Any]]:
    """One row per island, and one for the router: samples, steps, state, last loss."""
    folder, plan = Path(folder), read_plan(folder)
    rows = [
        {
            "part": f"island {entry.index}",
            "samples": entry.samples,
            **state_of(folder / entry.folder),
        }
        for entry in plan.islands
    ]
    if (folder / "router" / "config.json").is_file():
        total = sum(entry.samples for entry in plan.islands)
        rows.append({"part": "router", "samples": total, **state_of(folder / "router")})
    return rows


def entry_of(plan: IslandPlan, index: int) -> Any:
    if not 0 <= index < len(plan.islands):
        raise ConfigError(describe("index", index, f"0..{len(plan.islands) - 1}"))
    return plan.islands[index]


def state_of(folder: Path) -> dict[str, Any]:
    """``state`` (waiting, running, stopped or done), ``step`` of ``steps``, the last ``loss``."""
    run = RunDir(folder)
    config = run.read_config(RunConfig)
    saved = [step for step, _ in checkpoint.steps(folder)]
    records = read_metrics(run.metrics_path)
    step = max([0, *saved, *(record["step"] for record in records[-1:])])
    finished = max(saved, default=0) >= config.train.steps
    state = "done" if finished else "running" if run.is_held() else "stopped"
    return {
        "state": "waiting" if state == "stopped" and not step else state,
        "step": step,
        "steps": config.train.steps,
        "loss": records[-1].get("loss") if records else None,
    }


ALONE = """\
import sys
from coterie.runs.launch.child_processes import stop_with_parent
stop_with_parent()
from coterie.runs.islands.workers import run_island
run_island(*sys.argv[1:], False)
"""


def _spawn(folder: Path, index: int) -> child_processes.Child:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(open_own(_log(folder, index), flags), "wb") as log:
        return child_processes.start(ALONE, [str(folder), str(index)], output=log)


def _log(folder: Path, index: int) -> Path:
    return folder / f"island-{index}.log"


def _first_done(
    running: dict[int, child_processes.Child], signals: StopSignals
) -> tuple[int, child_processes.Child]:
    """Wait until one process has ended; Interrupted, when all have saved, after a signal."""
    while True:
        if signals.received is not None:
            child_processes.pass_on(signals.received, list(running.values()))
            where = "islands that were training have saved; the same command resumes"
            raise Interrupted(signals.received, where)
        for index, process in running.items():
            if process.poll() is not None:
                return index, process
        time.sleep(POLL)


def job_files(folder: str | Path, engines: Sequence[str]) -> list[Path]:
    """Write what schedulers submit: each job calls ``coterie island run PLAN --index i``."""
    folder, plan = Path(folder), read_plan(folder)
    count = len(plan.islands)
    texts: dict[Path, str] = {}
    if "slurm" in engines:
        texts[folder / "islands.slurm"] = SLURM.format(
            last=count - 1, plan=shlex.quote(str(folder)), log=_slurm_log(folder)
        )
    if "skypilot" in engines:
        for index in range(count):
            line = f"coterie island run {shlex.quote(str(folder))} --index {index} --quiet"
            # A JSON string is a YAML string, whatever is in it.
            texts[folder / f"island-{index}.sky.yaml"] = SKYPILOT.format(
                index=index, run=json.dumps(line)
            )
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _slurm_log(folder: Path) -> str:
    """A directive's value: no shell reads it, quotes hold it together, and % starts a pattern."""
    text = str(folder)
    if any(letter in text for letter in "\"'\\\n"):
        allowed = "a path without quotes, backslashes and line ends, which Slurm does not read"
        raise ConfigError(describe("plan", text, allowed, "choose another folder"))
    return f'"{text.replace("%", "%%")}/island-%a.log"'


SLURM = """\
#!/bin/bash
#SBATCH --job-name=islands
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --output={log}
# An island shares nothing with the others; requeued, it resumes from its own checkpoint.
srun coterie island run {plan} --index "$SLURM_ARRAY_TASK_ID" --quiet
"""

SKYPILOT = """\
name: island-{index}
resources:
  accelerators: 1
  use_spot: true
workdir: .
setup: pip install coterie
# After a spot machine is lost the same command resumes from the island's own checkpoint.
run: {run}
"""
