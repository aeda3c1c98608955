"""Quality against cost of one model under other routing settings: the settings, and the table of
results.

What they are worth on a run or on another model is found out where that is known
(:mod:`coterie.runs.measure.sweep`, :mod:`coterie.interop.transformers.sweep`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from coterie.core.errors import ConfigError, describe
from coterie.core.json_reader import literal
from coterie.experts import RouterConfig
from coterie.experts.rerouting import changed, check_paths
from coterie.inspect.statistics.experts_per_row import analyse_amounts
from coterie.inspect.statistics.trace import Trace

Settings = Mapping[str, Any]
Rule = tuple[RouterConfig, int]
"""A router's configuration, and how many experts it chooses among."""


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


def rows_of(
    rules: Sequence[Rule],
    paths: Mapping[str, Sequence[Any]],
    found: Sequence[tuple[Settings, dict[str, Any], float]],
) -> list[SweepRow]:
    """Rows of the settings that were evaluated, each with its numbers and its multiply-adds."""
    trained = [_is_trained(rules, settings) for settings, _, _ in found]
    base = next(adds for (_, _, adds), own in zip(found, trained) if own)
    return [
        SweepRow(
            settings=dict(settings) if settings else _trained_values(rules, paths),
            trained=own,
            relative_multiply_adds=adds / base,
            **numbers,
        )
        for (settings, numbers, adds), own in zip(found, trained)
    ]


def settings_of(
    rules: Sequence[Rule], paths: Mapping[str, Sequence[Any]], causal: bool
) -> list[dict[str, Any]]:
    """The settings to evaluate on routers with these rules, {} standing for their own; ConfigError
    unless all fit. ``causal``: they may not see the future."""
    if not paths:
        hint = "for example select.p=0.1,0.2,0.4"
        raise ConfigError(describe("paths", "none", "at least one path with values", hint))
    check_paths(paths)
    points = [dict(zip(paths, values)) for values in product(*paths.values())]
    for settings in points:
        for rule, num_experts in rules:
            config = changed(rule, settings)
            config.check(num_experts)
            if causal and config.batchwide:
                hint = "experts that choose among all tokens of a sample see the future"
                raise ConfigError(describe("select", config.select.kind, "a row-wise one", hint))
    if not any(_is_trained(rules, settings) for settings in points):
        return [{}, *points]
    return points


def _is_trained(rules: Sequence[Rule], settings: Settings) -> bool:
    return all(changed(rule, settings) == rule for rule, _ in rules)


def _trained_values(rules: Sequence[Rule], paths: Mapping[str, Any]) -> dict[str, Any]:
    """What the swept paths hold in the trained model; None where it has no such field."""
    out: dict[str, Any] = {}
    for path in paths:
        found = [_at(rule.model_dump(mode="json"), path) for rule, _ in rules]
        out[path] = found[0] if all(value == found[0] for value in found) else "various"
    return out


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data["kind"] if isinstance(data, dict) else data


def amounts_of(trace: Trace) -> dict[str, Any]:
    """Experts that rows use, as fields of a :class:`SweepRow`."""
    amounts = [item for item in analyse_amounts(trace) if item.mean == item.mean]
    return {
        "experts_per_row": sum(item.mean for item in amounts) / max(1, len(amounts)),
        "experts_per_row_max": max((item.most for item in amounts), default=0),
    }
