"""Routers, composed of a score, edits of the logits and a selection."""

from coterie.experts.routers.base import EDITS, SCORES, SELECTS, ScorePart, SelectPart
from coterie.experts.routers.config import RouterConfig
from coterie.experts.routers.edits import (
    BiasDelta,
    CandidateMask,
    Jitter,
    OpeningCandidates,
    ProgressiveCandidates,
)
from coterie.experts.routers.noise import FixedScore, NoiseLevelScore, NoiseWindowScore
from coterie.experts.routers.recurrent import RecurrentScore, share_cells
from coterie.experts.routers.router import Router
from coterie.experts.routers.scores import CosineScore, LinearScore, MLPScore, TaskLinearScore
from coterie.experts.routers.selections import (
    Dense,
    ExpertChoice,
    Fixed,
    GroupLimited,
    RandomK,
    Rank,
    TopK,
    TopP,
    top_ids,
)
from coterie.experts.routers.uncertain import UncertainScore

__all__ = [
    "EDITS",
    "SCORES",
    "SELECTS",
    "BiasDelta",
    "CandidateMask",
    "CosineScore",
    "Dense",
    "ExpertChoice",
    "Fixed",
    "FixedScore",
    "GroupLimited",
    "Jitter",
    "LinearScore",
    "MLPScore",
    "NoiseLevelScore",
    "NoiseWindowScore",
    "OpeningCandidates",
    "ProgressiveCandidates",
    "RandomK",
    "Rank",
    "RecurrentScore",
    "Router",
    "RouterConfig",
    "ScorePart",
    "SelectPart",
    "TaskLinearScore",
    "TopK",
    "TopP",
    "UncertainScore",
    "share_cells",
    "top_ids",
]
