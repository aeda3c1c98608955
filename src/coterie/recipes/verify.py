"""Claims as measurements: every arm, every seed, same budget; then one verdict per claim.

Arms run in worker processes of one thread each, resume where they stopped, and leave their
numbers in ``<work>/<commit>/<hash of the configuration>/measures.json``: an arm that two recipes
share is run once, and no number of another commit is reused. The verdict uses differences paired
by seed:

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from coterie.core.folder import digest, write_text
from coterie.core.machine import commit, hardware
from coterie.recipes.base import Claim, Recipe, get_recipe
from coterie.train.run import RunConfig

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
    budgets = {arm: _budget(config) for arm, config in recipe.arms().items()}
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
    from coterie.train.run import plan

    found = plan(config, measure=False)
    return {key: value for key, value in found.items() if key not in ("recipe", "preset")}


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


def _run_arms(
    recipe: Recipe,
    root: Path,
    seeds: int,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[dict[str, float]]]:
    arms = recipe.arms()
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    results: dict[tuple[str, int], dict[str, float]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=spawn) as pool:
        waiting = {}
        for arm, seed in jobs:
            config = arms[arm].replace(seed=seed)
            folder = root / digest(config.to_json())[:16]
            waiting[pool.submit(run_arm, config.to_json(), str(folder))] = (arm, seed)
        for count, future in enumerate(as_completed(waiting), start=1):
            arm, seed = waiting[future]
            results[arm, seed] = future.result()
            if progress is not None:
                progress(f"{arm} seed {seed}", count, len(jobs))
    return {arm: [results[arm, seed] for seed in range(seeds)] for arm in arms}


def run_arm(config_json: str, folder: str) -> dict[str, float]:
    """Train, measure and store one arm (in a worker process). Finished work is not repeated."""
    import torch

    from coterie.train.evaluate import measure
    from coterie.train.run import load_run, start

    torch.set_num_threads(1)
    config = RunConfig.from_json(config_json)
    config = config.replace(train=config.train.replace(threads=1))
    stored = Path(folder) / "measures.json"
    if stored.is_file():
        found = json.loads(stored.read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in found["measures"].items()}
    began = time.process_time()
    path = start(config, folder, progress=False)
    seconds = time.process_time() - began
    measures = {**measure(load_run(path)), "train_cpu_seconds": seconds}
    write_text(stored, json.dumps({"config": config.to_json(), "measures": measures}, indent=1))
    return measures
