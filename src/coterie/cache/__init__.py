"""Exact caches for sampling: what depends on noise level, label or references only is computed
once."""

from coterie.cache.conditioning_tables import KnownTables
from coterie.cache.cost import CacheCost, cost, count_flops, measure
from coterie.cache.denoiser import (
    CACHES,
    Cache,
    CachedDenoiser,
    applicable,
    cached,
    compile_network,
    fold_by_step,
)
from coterie.cache.layer import FoldedLayer
from coterie.cache.schedule import Schedule, Steps

__all__ = [
    "CACHES",
    "Cache",
    "CacheCost",
    "CachedDenoiser",
    "FoldedLayer",
    "KnownTables",
    "Schedule",
    "Steps",
    "applicable",
    "cached",
    "compile_network",
    "cost",
    "count_flops",
    "fold_by_step",
    "measure",
]
