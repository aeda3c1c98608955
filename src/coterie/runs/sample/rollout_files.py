"""Roll-outs of a policy as files and a table: success by goal, and savings of exact caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coterie.cache import measure
from coterie.core.errors import ConfigError, describe
from coterie.metrics import success_rate
from coterie.runs.judges import judge_of
from coterie.runs.judges.action import ActionJudge
from coterie.runs.sample.caches import cached
from coterie.runs.sample.rollouts import RolledOut, Rollouts
from coterie.runs.sample.sample_files import outputs_at, write_samples
from coterie.runs.trained_run import LoadedRun


def rollout_run(
    run: LoadedRun,
    num: int,
    out: str | Path,
    use_cache: bool = False,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """``num`` episodes, written to ``out``: ``goals`` (rows of successes), ``cache``, ``pictures``.

    ``options``: labels, seed, steps, guidance. ConfigError for a run that acts in no simulator.
    """
    judge = judge_of(run)
    if not isinstance(judge, ActionJudge) or judge.simulator is None:
        hint = f"{run.source.name!r} brings no simulator"
        raise ConfigError(describe("run", str(run.path), "a policy that acts in one", hint))
    outputs = outputs_at(out)
    made = judge.draw(num, cached=use_cache, progress=progress, **options)
    assert isinstance(made, RolledOut)
    found: dict[str, Any] = {
        "goals": by_goal(made.rollouts, run.source.class_names),
        "cache": saved(run, options.get("steps")) if use_cache else None,
    }
    shown = write_samples(judge, made, outputs, {"rollouts.json": found})
    return {**found, "pictures": str(shown)}


def by_goal(rolled: Rollouts, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each goal that occurs, and one for all."""
    goals = np.unique(rolled.goals) if names else ()
    rows = [_row(rolled, rolled.goals == goal, names[goal]) for goal in goals]
    return [*rows, _row(rolled, np.ones(len(rolled.goals), bool), "all")]


def _row(rolled: Rollouts, rows: np.ndarray, name: str) -> dict[str, Any]:
    good = rolled.success[rows]
    found = success_rate(int(good.sum()), int(rows.sum()))
    out: dict[str, Any] = {
        "goal": name,
        "episodes": found.trials,
        "success": round(found.rate, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
    }
    for way, word in enumerate(rolled.ways):
        out[word] = int((rolled.way[rows] == way).sum())
    return out


def saved(run: LoadedRun, steps: int | None) -> dict[str, Any]:
    """The exact caches in use; FLOPs of one call for one sample, numbers in memory and milliseconds
    of a call, without and with them."""
    kept, cost = cached(run, steps)
    return {"caches": list(kept.model.caches), **cost.as_dict(), **measure(kept.model)}
