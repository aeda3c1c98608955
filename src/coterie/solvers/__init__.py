"""Floor 4: solvers, grids, the sampling loop, guidance and thresholds."""

from coterie.solvers import exponential, runge_kutta, stochastic
from coterie.solvers.base import (
    SOLVERS,
    Estimate,
    Query,
    Solver,
    SolverConfig,
    SolverState,
)
from coterie.solvers.grids import GRIDS, GridConfig
from coterie.solvers.guidance import ClassifierGuided, GuidanceConfig, Guided, guide
from coterie.solvers.sampling import Callback, asked_times, initial_noise, integrate, sample
from coterie.solvers.thresholds import ThresholdConfig, Thresholded

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Callback",
    "ClassifierGuided",
    "Estimate",
    "GridConfig",
    "GuidanceConfig",
    "Guided",
    "Query",
    "Solver",
    "SolverConfig",
    "SolverState",
    "ThresholdConfig",
    "Thresholded",
    "asked_times",
    "exponential",
    "guide",
    "initial_noise",
    "integrate",
    "runge_kutta",
    "sample",
    "stochastic",
]
