"""Statistics of composed models: share of each expert, and weighted particles.

Nobody is chosen in a composition, so there is no routing to show. What can go wrong instead is the
weights: where few particles carry them, samples are copies of few. Legend: G systems, K particles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Composed:
    """A composition: ``experts`` as (name, power, condition), ``target`` as a formula, and whether
    particles correct the sum of scores."""

    mode: str
    target: str
    experts: Sequence[tuple[str, float, str]]
    corrected: bool
    log_prior: float = 0.0
    """Of the composition's initial law; with a record's ``log_ratio`` its log-normaliser."""


def steps_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Mean over all systems, step by step: effective share of the particles, the least of them,
    largest weight, share of the first particles that have descendants, resampled, clamped."""
    out = []
    for index in range(min((len(record["steps"]) for record in records), default=0)):
        rows = [record["steps"][index] for record in records]
        count = records[0]["particles"]

        def every(name: str, rows: Sequence[Mapping[str, Any]] = rows) -> list[float]:
            return [float(value) for row in rows for value in row[name]]

        out.append(
            {
                "t": float(rows[0]["t"]),
                "ess": fmean(every("ess")) / count,
                "ess_least": min(every("ess")) / count,
                "max_weight": fmean(every("max_weight")),
                "ancestors": fmean(every("ancestors")) / count,
                "resampled": fmean(every("resampled")),
                "clamped": fmean(every("clamped")),
            }
        )
    return out


def lineages(records: Sequence[Mapping[str, Any]]) -> float:
    """Share of the first particles that have descendants in the end, mean over systems."""
    shares = [len(set(row)) / len(row) for record in records for row in record["ancestors"]]
    return fmean(shares) if shares else math.nan
