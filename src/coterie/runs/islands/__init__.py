"""Islands: experts that are whole models, each trained separately on its part of the data."""

from coterie.runs.islands.partition import Islands, PartitionConfig, partition_of
from coterie.runs.islands.source import IslandConfig

__all__ = ["IslandConfig", "Islands", "PartitionConfig", "partition_of"]
