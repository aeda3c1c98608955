"""Floor 1: data sources, the order in which they are seen, and islands cut from them."""

# Importing a module registers its sources and downloads.
from coterie.data.actions import demonstrations
from coterie.data.catalog import SourceStatus, describe_source, status
from coterie.data.download import fetch
from coterie.data.images import (
    covered,
    emoji,
    folder,
    hub_datasets,
    image_downloads,
    images,
    latents,
    pairs_folder,
    photos,
)
from coterie.data.ordering import order
from coterie.data.parts import classes, shard
from coterie.data.parts.partition import Compaction, Partition, Shard, kmeans_partition, shards_of
from coterie.data.points import points_folder, points_furniture
from coterie.data.ratings import movielens, ratings
from coterie.data.source import (
    SOURCES,
    ArraySource,
    SourceConfig,
    SourceInfo,
    Split,
    Subset,
    build_source,
)
from coterie.data.text import problems, text, text_downloads
from coterie.data.text.text import ByteTokenizer
from coterie.data.worlds import metaworld, obstacle, points_solids, toys, weather
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
    "classes",
    "covered",
    "demonstrations",
    "describe_source",
    "emoji",
    "fetch",
    "folder",
    "hub_datasets",
    "image_downloads",
    "images",
    "kmeans_partition",
    "latents",
    "metaworld",
    "movielens",
    "obstacle",
    "order",
    "pairs_folder",
    "photos",
    "points_folder",
    "points_furniture",
    "points_solids",
    "problems",
    "ratings",
    "shard",
    "shards_of",
    "status",
    "text",
    "text_downloads",
    "toys",
    "weather",
]
