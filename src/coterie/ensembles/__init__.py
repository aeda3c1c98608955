"""Ensembles: several denoisers that act as one denoiser."""

from coterie.ensembles.aggregate import Aggregate, AggregateConfig
from coterie.ensembles.aggregator import AggregatorConfig
from coterie.ensembles.base import ENSEMBLES, Ensemble, EnsembleConfig
from coterie.ensembles.boundaries import Cut, losses_per_bin, search_boundaries
from coterie.ensembles.choices import CHOICES, Oracle, Sampled
from coterie.ensembles.closed_form import ExactPosterior, split_mixture
from coterie.ensembles.contrast import StrongWeak, StrongWeakConfig
from coterie.ensembles.coverage import Coverage, coverage
from coterie.ensembles.members import MemberFacts, Members
from coterie.ensembles.mixture import Mixture, MixtureConfig
from coterie.ensembles.model import EnsembleModelConfig, MemberConfig, model_of
from coterie.ensembles.noise_ranges import NoiseRanges, NoiseRangesConfig
from coterie.ensembles.product import Composition, CompositionConfig, compose
from coterie.ensembles.residency import LoadedMembers, Loader
from coterie.ensembles.rewards import REWARDS
from coterie.ensembles.router import ClusterRouter, ClusterRouterConfig

__all__ = [
    "CHOICES",
    "ENSEMBLES",
    "REWARDS",
    "Aggregate",
    "AggregateConfig",
    "AggregatorConfig",
    "ClusterRouter",
    "ClusterRouterConfig",
    "Composition",
    "CompositionConfig",
    "Coverage",
    "Cut",
    "Ensemble",
    "EnsembleConfig",
    "EnsembleModelConfig",
    "ExactPosterior",
    "LoadedMembers",
    "Loader",
    "MemberConfig",
    "MemberFacts",
    "Members",
    "Mixture",
    "MixtureConfig",
    "NoiseRanges",
    "NoiseRangesConfig",
    "Oracle",
    "Sampled",
    "StrongWeak",
    "StrongWeakConfig",
    "compose",
    "coverage",
    "losses_per_bin",
    "model_of",
    "search_boundaries",
    "split_mixture",
]
