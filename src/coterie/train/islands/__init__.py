"""Islands: experts that are whole models, each trained alone on its part of the data.

Here is what a run's data may be; :mod:`coterie.train.islands.plan` makes runs of it, and
:mod:`coterie.train.islands.work` trains them.
"""

from coterie.train.islands.partition import Islands, PartitionConfig, partition_of
from coterie.train.islands.source import IslandConfig

__all__ = ["IslandConfig", "Islands", "PartitionConfig", "partition_of"]
