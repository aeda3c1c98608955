"""Training past one process: copies, shards, and experts apart; the same samples as in one."""

from coterie.train.parallel.config import ParallelConfig
from coterie.train.parallel.processes import Processes, joined, launched
from coterie.train.parallel.spread import Spread
from coterie.train.parallel.supervisor import Hung, launch, planned

__all__ = [
    "Hung",
    "ParallelConfig",
    "Processes",
    "Spread",
    "joined",
    "launch",
    "launched",
    "planned",
]
