"""Training in several processes: data parallel, sharded, and expert parallel."""

from coterie.train.parallel.config import ParallelConfig
from coterie.train.parallel.processes import Processes, joined, launched
from coterie.train.parallel.spread import Spread

__all__ = [
    "ParallelConfig",
    "Processes",
    "Spread",
    "joined",
    "launched",
]
