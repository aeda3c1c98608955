"""Islands: experts that are whole models, each trained alone on its part of the data.

Here is what a run's data may be; :mod:`coterie.runs.islands.plan` makes runs of it, and
:mod:`coterie.runs.islands.workers` trains them.
"""

from coterie.runs.islands.partition import Islands, PartitionConfig, partition_of
from coterie.runs.islands.source import IslandConfig

__all__ = ["IslandConfig", "Islands", "PartitionConfig", "partition_of"]
