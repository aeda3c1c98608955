"""The adapters of several runs on their common base, as one run that trains nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.adapters import AdapterConfig, adapters_of, pairs, room, save_adapter, weights_of
from coterie.adapters.attach import own_modules
from coterie.adapters.reach import share
from coterie.core.errors import ConfigError, describe
from coterie.runs.build import based_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.measure.adapters import adapter_measures
from coterie.runs.origins.first_weights import InitConfig
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.train.run_directory import RunDir


def merged_run(runs: Sequence[str | Path], weights: Sequence[float] = ()) -> RunConfig:
    """``runs``: of one adapter each; their base is that of the first. ``weights``: () = 1 each."""
    if not runs or (weights and len(weights) != len(runs)):
        raise ConfigError(describe("weights", tuple(weights), f"one for each of {len(runs)} runs"))
    first = RunDir(runs[0]).read_config(RunConfig)
    if first.init is None or not first.init.adapters:
        raise ConfigError(describe("run", str(runs[0]), "a run that trains an adapter"))
    adapters = tuple(
        AdapterConfig(name=name, path=str(path), weight=weight)
        for name, path, weight in zip(_names(runs), runs, weights or [1.0] * len(runs))
    )
    init = InitConfig(path=first.init.path, weights=first.init.weights, adapters=adapters)
    train = first.train.replace(steps=0)
    return first.replace(init=init, train=train, data=first.data.whole)


def _names(runs: Sequence[str | Path]) -> list[str]:
    """Folder names in letters that adapters may have."""
    names = [re.sub(r"[^A-Za-z0-9_-]", "-", Path(run).resolve().name) for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(describe("runs", names, "folders whose names all differ"))
    return names


def check_together(runs: Sequence[str | Path]) -> dict[str, Any]:
    """What is known of the sum before it is used: ``adapters`` (rank, slot, how many would fit),
    ``pairs`` (overlaps) and, of two or more, ``measures`` on held-out data."""
    config = merged_run(runs)
    model = based_model(config).eval()
    loaded = LoadedRun(Path(runs[0]), config, model, build_source(config), 0)
    found, weights = adapters_of(model), weights_of(model)
    rows = []
    for name, parts in found.items():
        lora = next(iter(parts.values())).config
        basis = lora.basis
        rows.append(
            {
                "adapter": name,
                "rank": lora.rank,
                "weight": weights[name],
                "modules": len(parts),
                "share_of_parameters": round(share(own_modules(model), parts), 6),
                "basis": None if basis is None else basis.hash,
                "slot": None if basis is None else basis.index,
                "slots": room(parts),
            }
        )
    measures = adapter_measures(loaded)
    return {"adapters": rows, "pairs": [vars(pair) for pair in pairs(found)], "measures": measures}


def export_adapter(run: str | Path, out: str | Path, name: str | None = None) -> Path:
    """An adapter of a run as a folder in PEFT's layout; ``name``: which, where it has several."""
    loaded = load_run(run)
    there = list(adapters_of(loaded.model))
    if not there or (name is None and len(there) > 1):
        allowed = ", ".join(there) or "a run with adapters"
        raise ConfigError(describe("name", name, allowed))
    assert loaded.config.init is not None
    return save_adapter(loaded.model, name or there[0], out, base=loaded.config.init.path)
