"""What is learnt: ``objective(model, batch, rng, progress) -> Losses``. One file per objective."""

from coterie.train.objectives.base import OBJECTIVES
from coterie.train.objectives.classification import ClassificationConfig
from coterie.train.objectives.cluster_posterior import ClusterPosteriorConfig
from coterie.train.objectives.denoising import DenoisingConfig
from coterie.train.objectives.distillation import DistillationConfig
from coterie.train.objectives.multitask import MultiTaskObjectiveConfig
from coterie.train.objectives.recognition import RecognitionConfig
from coterie.train.objectives.restoration import RestorationConfig
from coterie.train.objectives.text import MaskedTokenConfig, NextTokenConfig

__all__ = [
    "OBJECTIVES",
    "ClassificationConfig",
    "ClusterPosteriorConfig",
    "DenoisingConfig",
    "DistillationConfig",
    "MaskedTokenConfig",
    "MultiTaskObjectiveConfig",
    "NextTokenConfig",
    "RecognitionConfig",
    "RestorationConfig",
]
