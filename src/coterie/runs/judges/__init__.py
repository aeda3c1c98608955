"""Judges: evaluation of a run's samples and held-out loss, one class per modality."""

from coterie.runs.judges import (
    action,
    noise,
    points,
    posterior,
    ratings,
    recognition,
    restoration,
    text,
)
from coterie.runs.judges.base import JUDGES, HeldOut, Judge, judge_of

__all__ = [
    "JUDGES",
    "HeldOut",
    "Judge",
    "action",
    "judge_of",
    "noise",
    "points",
    "posterior",
    "ratings",
    "recognition",
    "restoration",
    "text",
]
