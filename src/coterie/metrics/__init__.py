"""Floor 4: how good samples are, as pure functions of feature rows."""

from coterie.metrics.evaluate import evaluate_images, format_evaluation
from coterie.metrics.frechet import frechet_distance, gaussian_frechet
from coterie.metrics.kernel import Estimate, kid_unbiased
from coterie.metrics.manifold import PrecisionRecall, precision_recall
from coterie.metrics.noise_bins import Bin, NoiseBins

__all__ = [
    "Bin",
    "Estimate",
    "NoiseBins",
    "PrecisionRecall",
    "evaluate_images",
    "format_evaluation",
    "frechet_distance",
    "gaussian_frechet",
    "kid_unbiased",
    "precision_recall",
]
