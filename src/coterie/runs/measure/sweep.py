"""A trained model under other routing settings: quality against cost, without training.

    rows = sweep(run, {"select.p": [0.1, 0.2, 0.4]})

Every router of tokens runs with the settings of a row; paths lead into its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError
from coterie.experts.rerouting import changed, rerouted, token_routers
from coterie.inspect.page.sweep_table import sweep_outputs, write_rows
from coterie.inspect.statistics.sweep import (
    Rule,
    SweepRow,
    amounts_of,
    rows_of,
    settings_of,
    values_of,
)
from coterie.runs.judges import judge_of
from coterie.runs.measure.active_parameters import (
    Sites,
    active_parameters,
    choices_per_row,
    expert_multiply_adds,
    expert_sites,
)
from coterie.runs.measure.evaluation import held_out
from coterie.runs.trained_run import LoadedRun

__all__ = ["SweepRow", "check", "sweep", "sweep_outputs", "values_of", "write_sweep"]


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
    return rows_of(_rules(run), paths, found)


def check(run: LoadedRun, paths: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The settings to evaluate, {} standing for the trained one; ConfigError unless all fit."""
    rules = _rules(run)
    if not rules:
        raise ConfigError(f"{run.path}: no router chooses experts for tokens; nothing to sweep")
    causal = bool(getattr(getattr(run.config.model.backbone, "trunk", None), "causal", False))
    return settings_of(rules, paths, causal)


def _rules(run: LoadedRun) -> list[Rule]:
    return [(router.config, router.num_experts) for router in token_routers(run.model)]


def _evaluate(run: LoadedRun, sites: Sites, limit: int) -> tuple[dict[str, Any], float]:
    """The numbers of a row, and the multiply-adds of the expert layers."""
    found = held_out(run, limit=limit)
    choices = choices_per_row(found.trace)
    numbers = {
        "held_out_loss": found.loss,
        **amounts_of(found.trace),
        "active_parameters": active_parameters(run.model, sites, choices),
        "by_class": found.by_class,
    }
    return numbers, expert_multiply_adds(sites, choices)


def write_sweep(run: LoadedRun, rows: Sequence[SweepRow], limit: int, folder: Path) -> Path:
    """Write ``<paths>.json`` and the picture ``<paths>.png``; returns the path of the picture."""
    about = {"run": run.config.recipe or run.path.name, "step": run.step, "samples": limit}
    return write_rows(rows, about, judge_of(run).unit(), folder)
