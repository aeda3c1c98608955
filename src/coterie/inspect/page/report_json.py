"""``report.json``: every number behind the pictures, plain, sorted and without NaN."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coterie.inspect.page.findings import findings, sentences
from coterie.inspect.plots.balance import noise_usage
from coterie.inspect.plots.run import curve_series
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import HALVES, Joint, Place, RouterTrace
from coterie.inspect.statistics.experts_per_row import Amounts, analyse_amounts
from coterie.inspect.statistics.pairs import PairStats, analyse_pairs
from coterie.inspect.statistics.pools import PoolStats, analyse_pools
from coterie.inspect.statistics.routers import RouterStats
from coterie.inspect.statistics.trace import Trace

SCHEMA_VERSION = 1
MAX_CELLS = 20_000
"""Tables with more cells than this are left out of the file, which then says so."""
MAX_CURVE = 500


def to_json(data: Mapping[str, Any]) -> str:
    """Indented, but with each list of numbers on one line."""
    text = json.dumps(plain(data), indent=1, sort_keys=True, allow_nan=False)
    return re.sub(r"\[[\s\d.,eE+\-nul]*\]", _one_line, text) + "\n"


def _one_line(found: re.Match[str]) -> str:
    return "[" + ", ".join(found.group()[1:-1].replace(",", " ").split()) + "]"


def plain(value: Any) -> Any:
    """JSON types only: arrays become lists, six significant digits, non-finite becomes null."""
    if isinstance(value, np.ndarray):
        whole = np.isfinite(value).all() and (value == np.floor(value)).all()
        return value.astype(np.int64).tolist() if whole else plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            return None
        return int(number) if number.is_integer() and abs(number) < 1e15 else float(f"{number:.6g}")
    if isinstance(value, np.integer):
        return int(value)
    return str(value)


def routing_numbers(
    trace: Trace, items: Sequence[RouterStats], class_names: Sequence[str] = ()
) -> dict[str, Any]:
    usage, source = noise_usage(trace.routers)
    affinity = None
    if usage is not None:
        affinity = {"overlap": formulas.task_affinity(usage), "source": source}
    return {
        "noise_bins": trace.noise_bins,
        "grid": trace.grid,
        "summary": sentences(trace, items, class_names),
        "findings": [asdict(finding) for finding in findings(items)],
        "routers": [_router(router, item) for router, item in zip(trace.routers, items)],
        "steps": [_steps(trace, place) for place in trace.steps],
        "task_affinity": affinity,
        "experts_per_row": [_amounts(item) for item in analyse_amounts(trace)],
        "pairs": [_pair(pair) for pair in analyse_pairs(trace)],
        "pools": [_pool(pool) for pool in analyse_pools(trace)],
    }


def _amounts(item: Amounts) -> dict[str, Any]:
    return {**vars(item), "place": item.place._asdict(), "by_class": _small(item.by_class)}


def _pair(pair: PairStats) -> dict[str, Any]:
    info = pair.information
    return {
        **vars(pair),
        "first": pair.first._asdict(),
        "second": pair.second._asdict(),
        "information": None if info is None else {**asdict(info), "measurable": info.measurable},
        "lift": _small(pair.lift),
    }


def _pool(pool: PoolStats) -> dict[str, Any]:
    return {**vars(pool), "own_shares": pool.own_shares}


def similarity_numbers(similarity: Mapping[Place, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "place": place._asdict(),
            "mean": formulas.off_diagonal_mean(values),
            "cosine": _small(values),
        }
        for place, values in similarity.items()
    ]


def _router(router: RouterTrace, item: RouterStats) -> dict[str, Any]:
    values = {key: value for key, value in vars(item).items() if key != "information"}
    values["place"] = item.place._asdict()
    values["information"] = {
        facet: {**asdict(info), "measurable": info.measurable}
        for facet, info in item.information.items()
    }
    half = router.main
    confidence = formulas.confidence_entropy(
        router.entropy[half], router.entropy_rows[half], router.num_experts
    )
    return {
        **values,
        "choices_histogram": router.choices[half],
        "confidence_by_noise": confidence,
        "gate_mass_by_noise": router.gate_mass[half],
        "prob_mass_by_noise": router.prob_mass[half],
        "counts": {
            "noise": _table(router.noise),
            "class": _table(router.classes),
            "position": _table(router.positions),
            "task": _table(router.tasks),
            "total": _table(router.total),
        },
        "coactivation": _small(router.pairs[half]),
        "coactivation_lift": _small(formulas.coactivation_lift(router.pairs[half])),
        "prototype_cosine": (
            None if router.prototypes is None else _small(formulas.cosine_matrix(router.prototypes))
        ),
    }


def _table(table: Joint) -> dict[str, Any]:
    """Choices [column][expert] and rows [column] for each half; empty halves are left out."""
    if table.reason:
        return {"omitted": table.reason}
    out: dict[str, Any] = {}
    for half, name in enumerate(HALVES):
        if table.rows[half].any():
            out[name] = {"choices": _small(table.counts[half]), "rows": table.rows[half]}
    return out


def _small(array: np.ndarray) -> Any:
    if array.size > MAX_CELLS:
        return {"omitted": f"{' x '.join(map(str, array.shape))} numbers"}
    return array


def _steps(trace: Trace, place: Any) -> dict[str, Any]:
    step = trace.steps[place]
    early, late = step.early_late()
    return {
        "place": place._asdict(),
        "overlap": step.mean_overlap(),
        "overlap_conditional": step.mean_overlap(0),
        "overlap_unconditional": step.mean_overlap(1),
        "early": early,
        "late": late,
        "chance": formulas.chance_overlap(step.counts.sum(0), float(step.rows_seen.sum())),
        "choices": _small(step.counts),
    }


def curve_numbers(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each logged quantity as steps and values, thinned to :data:`MAX_CURVE` points."""
    out = {}
    for key, (steps, values) in curve_series(curve).items():
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_CURVE)).round())
        index = kept.astype(int).tolist()
        out[key] = {"step": [steps[i] for i in index], "value": [values[i] for i in index]}
    return out
