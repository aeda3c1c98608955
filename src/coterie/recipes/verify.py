"""Claims as measurements: every arm, every seed, same budget; then one verdict per claim.

Arms run in worker processes of one thread each, resume where they stopped, and leave their
numbers in ``<work>/<commit>/<hash of the configuration>/measures.json``: an arm that two recipes
share is run once, and no number of another commit is reused. An arm may name others, by
``arm:NAME`` in place of a path: it is run after them and finds what they have learnt under the same
seed. What the first weights of an arm with ``init`` are worth is measured too (``initial_...``); an
arm that others build on and no claim asks about is trained, but not measured.
The verdict uses differences paired by seed:

    shown = the mean difference has the right sign, every seed agrees,
            and the mean exceeds one standard deviation of the differences.

Anything else is reported as not shown; that is a result.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, unknown
from coterie.core.folder import digest, write_text
from coterie.core.json_reader import read_object
from coterie.core.machine import commit, hardware
from coterie.recipes.base import Claim, Recipe, get_recipe
from coterie.runs.config import RunConfig

ARM = "arm:"
RULE = "paired by seed: right sign in every seed, and mean difference above one standard deviation"


def verify(
    name: str,
    work: str | Path = "runs/verify",
    seeds: int = 3,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run all arms of recipe ``name`` and judge its claims. Returns the result object."""
    recipe = get_recipe(name)
    began = time.time()
    root = Path(work) / (commit() or "no-commit")
    measured = _run_arms(recipe, root, seeds, workers or _cores(), progress)
    budgets = {arm: _budget(job_of(recipe, arm, 0, root).config) for arm in recipe.arms()}
    return {
        "recipe": name,
        "commit": commit(),
        "hardware": hardware(),
        "rule": RULE,
        "seconds": round(time.time() - began, 1),
        "workers": workers or _cores(),
        "threads_per_worker": 1,
        "claims": [
            {**judge(claim, measured), "budget": _budgets_of(claim, budgets)}
            for claim in recipe.claims
        ],
        "measures": measured,
    }


def judge(claim: Claim, measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """One verdict from ``{arm: [measures of seed 0, seed 1, ...]}``."""
    ours = [run[claim.metric] for run in measured[claim.ours]]
    if claim.target is not None:
        base = [claim.target] * len(ours)
    else:
        runs = measured[claim.baseline or claim.ours]
        base = [run[claim.against or claim.metric] for run in runs]
    sign = 1 if claim.better == "lower" else -1
    slack = claim.tolerance * abs(statistics.mean(base))
    gains = [sign * (claim.factor * b - o) + slack for o, b in zip(ours, base, strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return {
        "claim": claim.claim,
        "metric": claim.metric,
        "against": claim.against or claim.metric,
        "ours": _mean(ours),
        "baseline": _mean(base),
        "arms": [
            claim.ours,
            claim.baseline or ("target" if claim.target is not None else claim.ours),
        ],
        "spread": spread,
        "better": claim.better,
        "factor": claim.factor,
        "tolerance": claim.tolerance,
        "seeds": len(ours),
        "per_seed": {"ours": ours, "baseline": base},
        "shown": bool(min(gains) > 0 and statistics.mean(gains) > spread),
    }


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _budgets_of(claim: Claim, budgets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {arm: budgets[arm] for arm in (claim.ours, claim.baseline) if arm}


def _budget(config: RunConfig) -> dict[str, Any]:
    """What an arm may use: steps, batch, parameters (all and active), FLOPs per step."""
    from coterie.runs.cost import plan

    found = plan(config, measure=False)
    return {key: value for key, value in found.items() if key not in ("recipe", "preset")}


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


@dataclass(frozen=True)
class Job:
    """One arm under one seed, in the folder it is trained in, and the arms it builds on."""

    arm: str
    seed: int
    config: RunConfig
    folder: Path
    after: tuple[str, ...] = ()


def job_of(recipe: Recipe, arm: str, seed: int, root: Path) -> Job:
    """The folder's name depends on the configuration, and on those of the arms it names, alone."""
    arms = recipe.arms()
    config = arms[arm].replace(seed=seed)
    data = config.model_dump(mode="json")
    named = dict(_named(data))
    for name, path in named.items():
        if name not in arms:
            raise ConfigError(unknown(f"{recipe.name}: {arm}: {path}", name, arms))
    before = {ARM + name: job_of(recipe, name, seed, root).folder for name in named}
    if not before:
        return Job(arm, seed, config, root / digest(config.to_json())[:16])
    alone = _placed(data, {name: folder.name for name, folder in before.items()})
    placed = _placed(data, {name: str(folder) for name, folder in before.items()})
    folder = root / digest(alone)[:16]
    return Job(arm, seed, RunConfig.from_dict(placed), folder, tuple(named))


def _named(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(arm, path of the field that names it) for each ``arm:NAME`` in a configuration's JSON."""
    if isinstance(data, str) and data.startswith(ARM):
        yield data.removeprefix(ARM), path
    items = data.items() if isinstance(data, dict) else enumerate(data if _is_list(data) else ())
    for key, value in items:
        yield from _named(value, f"{path}.{key}" if path else str(key))


def _placed(data: Any, folders: dict[str, str]) -> Any:
    """The JSON with the folder of each arm in place of its name."""
    if isinstance(data, dict):
        return {key: _placed(value, folders) for key, value in data.items()}
    if _is_list(data):
        return [_placed(value, folders) for value in data]
    return folders.get(data, data) if isinstance(data, str) else data


def _is_list(data: Any) -> bool:
    return isinstance(data, list | tuple)


def _run_arms(
    recipe: Recipe,
    root: Path,
    seeds: int,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[dict[str, float]]]:
    arms = list(recipe.arms())
    left = [job_of(recipe, arm, seed, root) for seed in range(seeds) for arm in arms]
    total = len(left)
    parts = {name for job in left for name in job.after} - _claimed(recipe)
    results: dict[tuple[str, int], dict[str, float]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=spawn) as pool:
        waiting: dict[Future[dict[str, float]], Job] = {}
        while left or waiting:
            ready = [job for job in left if all((arm, job.seed) in results for arm in job.after)]
            left = [job for job in left if job not in ready]
            for job in ready:
                work = train_part if job.arm in parts else run_arm
                waiting[pool.submit(work, job.config.to_json(), str(job.folder))] = job
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job = waiting.pop(future)
                results[job.arm, job.seed] = future.result()
                if progress is not None:
                    progress(f"{job.arm} seed {job.seed}", len(results), total)
    return {arm: [results[arm, seed] for seed in range(seeds)] for arm in arms}


def _claimed(recipe: Recipe) -> set[str]:
    return {arm for claim in recipe.claims for arm in (claim.ours, claim.baseline)}


def train_part(config_json: str, folder: str) -> dict[str, float]:
    """Train an arm that others are made of (in a worker process); nothing of it is measured."""
    import torch

    from coterie.runs.training import start

    torch.set_num_threads(1)
    config = RunConfig.from_json(config_json)
    began = time.process_time()
    start(config.replace(train=config.train.replace(threads=1)), folder, progress=False)
    return {"train_cpu_seconds": time.process_time() - began}


def run_arm(config_json: str, folder: str) -> dict[str, float]:
    """Train, measure and store one arm (in a worker process). Finished work is not repeated."""
    import torch

    from coterie.runs.measure.evaluation import measure
    from coterie.runs.trained_run import load_run
    from coterie.runs.training import start

    torch.set_num_threads(1)
    config = RunConfig.from_json(config_json)
    config = config.replace(train=config.train.replace(threads=1))
    stored = Path(folder) / "measures.json"
    if stored.is_file():
        found = read_object(stored)
        return {str(key): float(value) for key, value in found["measures"].items()}
    first = {} if config.init is None else _initial(config, Path(folder))
    began = time.process_time()
    path = start(config, folder, progress=False)
    seconds = time.process_time() - began
    measures = {**measure(load_run(path)), **first, "train_cpu_seconds": seconds}
    write_text(stored, json.dumps({"config": config.to_json(), "measures": measures}, indent=1))
    return measures


def _initial(config: RunConfig, folder: Path) -> dict[str, float]:
    """Held-out loss and load of the weights an arm starts from; kept, as training moves on."""
    from coterie.runs.measure.evaluation import held_out
    from coterie.runs.measure.routing import routing_measures
    from coterie.runs.trained_run import load_run
    from coterie.runs.training import prepare

    stored = folder / "initial.json"
    if not stored.is_file():
        found = held_out(load_run(prepare(config, folder)))
        measures = {"initial_loss": found.loss}
        loads = routing_measures(found.trace)
        if loads:
            measures["initial_load_cv"] = loads["load_cv"]
        write_text(stored, json.dumps(measures, indent=1))
    return {str(k): float(v) for k, v in read_object(stored).items()}
