"""Training past one process: copies, shards, and experts apart; the same samples as in one."""

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
