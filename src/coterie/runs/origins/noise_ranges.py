"""Trained denoisers, each for a range of noise levels, as one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coterie.core.config import override
from coterie.core.errors import ConfigError, describe
from coterie.ensembles import EnsembleModelConfig, MemberConfig, NoiseRangesConfig
from coterie.ensembles.boundaries import Cut, losses_per_bin, search_boundaries
from coterie.runs.build import build_source
from coterie.runs.config import RunConfig
from coterie.runs.judges.base import batches
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.training import start
from coterie.train.run_directory import RunDir

SAMPLES = 256  # held-out samples on which boundaries are searched
UNITS = ("t", "sigma", "log_snr")


def join_ranges(
    runs: Sequence[str | Path],
    boundaries: Sequence[float],
    out: str | Path,
    unit: Literal["t", "sigma", "log_snr"] = "t",
    guidance: Sequence[float | None] | None = None,
    changes: Mapping[str, Any] | None = None,
    live: bool = False,
    precision: Sequence[str] | None = None,
) -> Path:
    """Write the run that asks ``runs``, the noisiest first, each in its range.

    Data and sampling are those of the first run. Weights are named by their hash; ``live``: by path
    only, so that a run that is still being trained can be sampled with its partners. ``precision``:
    what each run computes in (``float32``, ``bfloat16``, ``float16``). ConfigError
    where the boundaries do not fit the runs, or the runs each other.
    """
    config = NoiseRangesConfig.from_dict(
        {
            "boundaries": tuple(boundaries),
            "boundaries_in": unit,
            "guidance": None if guidance is None else tuple(guidance),
        }
    )
    made = _run(runs, config, live, precision)
    return start(override(made, changes or {}), out)


def find_boundaries(runs: Sequence[str | Path], bins: int = 20) -> tuple[list[str], Cut]:
    """The order of runs and the boundaries in t between them with the least held-out loss (of x0,
    mean over ``bins`` of t); runs that are the best nowhere have no range."""
    if bins < len(runs):
        raise ConfigError(describe("bins", bins, f"at least the {len(runs)} runs"))
    even = tuple(float(b) for b in np.linspace(1, 0, len(runs) + 1)[1:-1])
    made = _run(runs, NoiseRangesConfig(boundaries=even), live=True)
    ensemble = made.model.build()
    process = ensemble.process
    edges = np.linspace(process.t_min, process.t_max, bins + 1)
    seen = batches(build_source(made, "held_out"), 64, SAMPLES)
    found = search_boundaries(losses_per_bin(ensemble, seen, edges.tolist()), edges)
    return [str(runs[member]) for member in found.members], found


def _run(
    runs: Sequence[str | Path],
    config: NoiseRangesConfig,
    live: bool,
    precision: Sequence[str] | None = None,
) -> RunConfig:
    if len(runs) < 2:
        raise ConfigError(describe("runs", [str(run) for run in runs], "two or more"))
    first = RunDir(runs[0]).read_config(RunConfig)
    kinds = ["float32"] * len(runs) if precision is None else list(precision)
    if len(kinds) != len(runs):
        raise ConfigError(describe("precision", kinds, f"{len(runs)}, one per run"))
    models = [
        PretrainedConfig.from_dict({"path": str(run), "precision": kind})
        for run, kind in zip(runs, kinds, strict=True)
    ]
    members = tuple(
        MemberConfig(
            name=f"range {index}: {Path(model.path).name}", model=model if live else model.pinned()
        )
        for index, model in enumerate(models)
    )
    times = getattr(first.objective, "times", None)
    whole = times.times if times is not None and times.kind == "within" else times
    return first.replace(
        recipe="",
        preset="",
        init=None,
        model=EnsembleModelConfig(ensemble=config, members=members),
        objective=first.objective if whole is None else first.objective.replace(times=whole),
        train=first.train.replace(steps=0),
    )
