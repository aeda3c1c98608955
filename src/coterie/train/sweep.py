"""A trained model under other routing settings: quality against cost, without retraining.

    rows = sweep(run, {"select.p": [0.1, 0.2, 0.4]})

Every router of tokens runs with the settings of a row; paths lead into its configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, describe
from coterie.core.json_reader import literal
from coterie.core.machine import commit, hardware
from coterie.core.outputs import Outputs, pair_at
from coterie.experts import Router
from coterie.experts.rerouting import changed, check_paths, rerouted, token_routers
from coterie.inspect import analyse_amounts
from coterie.train.active import (
    Sites,
    active_parameters,
    choices_per_row,
    expert_multiply_adds,
    expert_sites,
)
from coterie.train.evaluate import held_out
from coterie.train.judges import judge_of
from coterie.train.run import LoadedRun

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class SweepRow:
    """One setting, ``{path: value}``, and what it gives on held-out data."""

    settings: dict[str, Any]
    trained: bool  # as the model was trained
    held_out_loss: float
    experts_per_row: float  # mean over rows and routers
    experts_per_row_max: int  # the most that any row uses, what padding would cost
    active_parameters: int
    relative_multiply_adds: float  # of the expert layers, 1 = as trained
    by_class: dict[str, float]  # held-out loss of each class, where there are any


def values_of(text: str) -> list[Any]:
    """``0.1,0.2`` -> two values; JSON of a list or an object is one value; words stay words."""
    parts = [text] if text.startswith(("[", "{")) else [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(describe("values", text, "values with single commas between them"))
    return [literal(part, "values") for part in parts]


def sweep(
    run: LoadedRun,
    paths: Mapping[str, Sequence[Any]],
    limit: int = 512,
    progress: Callable[[int], None] | None = None,
) -> list[SweepRow]:
    """One row per combination of the values, and one for the trained setting if it is not among
    them. ConfigError for a setting that does not fit, before anything is evaluated."""
    points = check(run, paths)
    sites = expert_sites(run)
    found = []
    for settings in points:
        with rerouted(run.model, lambda config, _, s=settings: changed(config, s)):  # type: ignore[misc]
            found.append((settings, *_evaluate(run, sites, limit)))
        if progress is not None:
            progress(1)
    trained = [_is_trained(run, settings) for settings in points]
    cost = {id(numbers): adds for _, numbers, adds in found}
    base = next(cost[id(numbers)] for (_, numbers, _), own in zip(found, trained) if own)
    routers = token_routers(run.model)
    return [
        SweepRow(
            settings=dict(settings) if settings else _trained_values(routers, paths),
            trained=own,
            relative_multiply_adds=adds / base,
            **numbers,
        )
        for (settings, numbers, adds), own in zip(found, trained)
    ]


def check(run: LoadedRun, paths: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The settings to evaluate, {} standing for the trained one; ConfigError unless all fit."""
    routers = token_routers(run.model)
    if not routers:
        raise ConfigError(f"{run.path}: no router chooses experts for tokens; nothing to sweep")
    if not paths:
        hint = "for example select.p=0.1,0.2,0.4"
        raise ConfigError(describe("paths", "none", "at least one path with values", hint))
    check_paths(paths)
    points = [dict(zip(paths, values)) for values in product(*paths.values())]
    causal = bool(getattr(getattr(run.config.model.backbone, "trunk", None), "causal", False))
    for settings in points:
        for router in routers:
            config = changed(router.config, settings)
            config.check(router.num_experts)
            if causal and config.batchwide:
                hint = "experts that choose among all tokens of a sample see the future"
                raise ConfigError(describe("select", config.select.kind, "a row-wise one", hint))
    if not any(_is_trained(run, settings) for settings in points):
        return [{}, *points]
    return points


def _is_trained(run: LoadedRun, settings: Settings) -> bool:
    return all(changed(r.config, settings) == r.config for r in token_routers(run.model))


def _trained_values(routers: Sequence[Router], paths: Mapping[str, Any]) -> dict[str, Any]:
    """What the swept paths hold in the trained model; None where it has no such field."""
    out: dict[str, Any] = {}
    for path in paths:
        found = [_at(router.config.model_dump(mode="json"), path) for router in routers]
        out[path] = found[0] if all(value == found[0] for value in found) else "various"
    return out


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data["kind"] if isinstance(data, dict) else data


def _evaluate(run: LoadedRun, sites: Sites, limit: int) -> tuple[dict[str, Any], float]:
    """The numbers of a row, and the multiply-adds of the expert layers."""
    found = held_out(run, limit=limit)
    choices = choices_per_row(found.trace)
    amounts = [item for item in analyse_amounts(found.trace) if item.mean == item.mean]
    numbers = {
        "held_out_loss": found.loss,
        "experts_per_row": sum(item.mean for item in amounts) / max(1, len(amounts)),
        "experts_per_row_max": max((item.most for item in amounts), default=0),
        "active_parameters": active_parameters(run.model, sites, choices),
        "by_class": found.by_class,
    }
    return numbers, expert_multiply_adds(sites, choices)


def write_sweep(run: LoadedRun, rows: Sequence[SweepRow], limit: int, folder: Path) -> Path:
    """Write ``<paths>.json`` and the picture ``<paths>.png``; returns the path of the picture."""
    from coterie.inspect.plots.style import render
    from coterie.inspect.plots.sweep import plot_sweep

    outputs = sweep_outputs(folder, rows[0].settings)
    name = outputs.index.removesuffix(".json")
    data = {
        "run": run.config.recipe or run.path.name,
        "step": run.step,
        "samples": limit,
        "loss_unit": judge_of(run).unit(),
        "commit": commit(),
        "hardware": hardware(),
        "rows": [vars(row) for row in rows],
    }
    plot = plot_sweep([vars(row) for row in rows], judge_of(run).unit())
    with outputs.writing() as work:
        (work / outputs.index).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (work / f"{name}.png").write_bytes(render(plot).light)
    return outputs.folder / f"{name}.png"


def sweep_outputs(folder: str | Path, paths: Collection[str]) -> Outputs:
    """Where the files of a sweep over ``paths`` go, looked at before anything is evaluated."""
    return pair_at(folder, "_".join(paths), "loss_unit")
