"""Metrics of samples: functions of feature rows or point clouds."""

from coterie.metrics.evaluate import evaluate_images, format_evaluation
from coterie.metrics.frechet import frechet_distance, gaussian_frechet
from coterie.metrics.kernel import Estimate, kid_unbiased
from coterie.metrics.manifold import PrecisionRecall, precision_recall
from coterie.metrics.noise_bins import Bin, NoiseBins
from coterie.metrics.points import SetScores, cloud_distance, score_points
from coterie.metrics.ranking import Grouped, auc, gauc
from coterie.metrics.success import Success, success_rate

__all__ = [
    "Bin",
    "Estimate",
    "Grouped",
    "NoiseBins",
    "PrecisionRecall",
    "SetScores",
    "Success",
    "auc",
    "cloud_distance",
    "evaluate_images",
    "format_evaluation",
    "frechet_distance",
    "gauc",
    "gaussian_frechet",
    "kid_unbiased",
    "precision_recall",
    "score_points",
    "success_rate",
]
