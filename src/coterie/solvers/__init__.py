"""Sampling: solvers, time grids, the sampling loop, guidance and clipping."""

from coterie.solvers import exponential, feynman_kac, runge_kutta, stochastic
from coterie.solvers.base import (
    SOLVERS,
    Estimate,
    Query,
    Solver,
    SolverConfig,
    SolverState,
)
from coterie.solvers.checks import NonFiniteSamples
from coterie.solvers.feynman_kac import FeynmanKac, FeynmanKacConfig, ParticleRecord
from coterie.solvers.grids import GRIDS, GridConfig
from coterie.solvers.guidance import ClassifierGuided, GuidanceConfig, Guided, guide
from coterie.solvers.resampling import SCHEMES, effective_size, resample
from coterie.solvers.sampling import Callback, asked_times, initial_noise, integrate, sample
from coterie.solvers.stepper import Finished, Stepper
from coterie.solvers.thresholds import ThresholdConfig, Thresholded

__all__ = [
    "GRIDS",
    "SCHEMES",
    "SOLVERS",
    "Callback",
    "ClassifierGuided",
    "Estimate",
    "FeynmanKac",
    "FeynmanKacConfig",
    "Finished",
    "GridConfig",
    "GuidanceConfig",
    "Guided",
    "NonFiniteSamples",
    "ParticleRecord",
    "Query",
    "Solver",
    "SolverConfig",
    "SolverState",
    "Stepper",
    "ThresholdConfig",
    "Thresholded",
    "asked_times",
    "effective_size",
    "exponential",
    "feynman_kac",
    "guide",
    "initial_noise",
    "integrate",
    "resample",
    "runge_kutta",
    "sample",
    "stochastic",
]
