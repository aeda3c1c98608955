"""Floor 4: many denoisers are one denoiser."""

from coterie.ensembles.base import ENSEMBLES, SLOT, Ensemble, EnsembleConfig
from coterie.ensembles.choices import CHOICES, Oracle, Sampled
from coterie.ensembles.closed_form import ExactPosterior, split_mixture
from coterie.ensembles.coverage import Coverage, coverage
from coterie.ensembles.members import MemberFacts, Members
from coterie.ensembles.mixture import Mixture, MixtureConfig
from coterie.ensembles.router import ClusterRouter, ClusterRouterConfig

__all__ = [
    "CHOICES",
    "ENSEMBLES",
    "SLOT",
    "ClusterRouter",
    "ClusterRouterConfig",
    "Coverage",
    "Ensemble",
    "EnsembleConfig",
    "ExactPosterior",
    "MemberFacts",
    "Members",
    "Mixture",
    "MixtureConfig",
    "Oracle",
    "Sampled",
    "coverage",
    "split_mixture",
]
