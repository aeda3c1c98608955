"""Noising processes, views of a prediction, loss weights, training times and preconditioning."""

from coterie.process import discrete, learned_weightings, schedules
from coterie.process.base import PROCESSES, Process, expand
from coterie.process.closed_form import ExactDenoiser, Mixture
from coterie.process.contrast import ContrastConfig, contrast, with_and_without
from coterie.process.level_cache import Number, OneCall, remembered, weights
from coterie.process.preconditioning import PRECONDITIONS, Precondition
from coterie.process.times import TIMES, Times, cluster_of
from coterie.process.times_within import WithinTimes, share_within
from coterie.process.transport import Transported, transport
from coterie.process.variational import (
    Transition,
    elbo_weights,
    learned_log_variance,
    transition,
    vlb_bits,
)
from coterie.process.views import (
    affine,
    as_view,
    check_view,
    convert,
    error_scale,
    target_of,
    view_slope,
)
from coterie.process.weightings import WEIGHTINGS, Weighting

__all__ = [
    "PRECONDITIONS",
    "PROCESSES",
    "TIMES",
    "WEIGHTINGS",
    "ContrastConfig",
    "ExactDenoiser",
    "Mixture",
    "Number",
    "OneCall",
    "Precondition",
    "Process",
    "Times",
    "Transition",
    "Transported",
    "Weighting",
    "WithinTimes",
    "affine",
    "as_view",
    "check_view",
    "cluster_of",
    "contrast",
    "convert",
    "discrete",
    "elbo_weights",
    "error_scale",
    "expand",
    "learned_log_variance",
    "learned_weightings",
    "remembered",
    "schedules",
    "share_within",
    "target_of",
    "transition",
    "transport",
    "view_slope",
    "vlb_bits",
    "weights",
    "with_and_without",
]
