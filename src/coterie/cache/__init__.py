"""Floor 4: what is known beforehand is not computed again. Lossless: the same answers."""

from coterie.cache.cost import CacheCost, cost, count_flops, measure
from coterie.cache.fold import FoldedDenoiser, fold_by_step
from coterie.cache.layer import FoldedLayer
from coterie.cache.schedule import Schedule, Steps

__all__ = [
    "CacheCost",
    "FoldedDenoiser",
    "FoldedLayer",
    "Schedule",
    "Steps",
    "cost",
    "count_flops",
    "fold_by_step",
    "measure",
]
