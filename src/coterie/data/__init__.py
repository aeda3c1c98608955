"""Data sources, and the order in which training reads them.

There is a folder per modality; ``worlds`` has computed data, ``parts`` parts of other sources. Each
module below registers its sources and what they download.
"""

import coterie.data.actions.demonstration_file
import coterie.data.images.covered
import coterie.data.images.downloads
import coterie.data.images.emoji
import coterie.data.images.huggingface
import coterie.data.images.image_folder
import coterie.data.images.latents
import coterie.data.images.packaged
import coterie.data.images.pairs_folder
import coterie.data.images.photos
import coterie.data.parts.class_subset
import coterie.data.parts.shard
import coterie.data.points.cloud_folder
import coterie.data.points.furniture
import coterie.data.ratings.movielens
import coterie.data.ratings.rating_rows
import coterie.data.text.downloads
import coterie.data.text.problems
import coterie.data.worlds.metaworld
import coterie.data.worlds.obstacle
import coterie.data.worlds.solids
import coterie.data.worlds.weather  # noqa: F401
from coterie.data.catalog import SourceStatus, describe_source, status
from coterie.data.ordering import order
from coterie.data.parts.partition import Compaction, Partition, Shard, kmeans_partition, shards_of
from coterie.data.source import (
    SOURCES,
    ArraySource,
    SourceConfig,
    SourceInfo,
    Split,
    Subset,
    build_source,
)
from coterie.data.text.packaged import ByteTokenizer
from coterie.data.worlds.toys import Mixture

__all__ = [
    "SOURCES",
    "ArraySource",
    "ByteTokenizer",
    "Compaction",
    "Mixture",
    "Partition",
    "Shard",
    "SourceConfig",
    "SourceInfo",
    "SourceStatus",
    "Split",
    "Subset",
    "build_source",
    "describe_source",
    "kmeans_partition",
    "order",
    "shards_of",
    "status",
]
