"""Who says what a run is worth: one judge per modality."""

from coterie.runs.judges import action
from coterie.runs.judges import noise
from coterie.runs.judges import points
from coterie.runs.judges import posterior
from coterie.runs.judges import ratings
from coterie.runs.judges import recognition
from coterie.runs.judges import restoration
from coterie.runs.judges import text
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
