"""Floor 1: data sources, the order in which they are seen, and islands cut from them."""

# Importing a module registers its sources and downloads.
from coterie.data import (
    emoji,
    fetch,
    folder,
    hub_datasets,
    image_downloads,
    images,
    latents,
    movielens,
    photos,
    points_folder,
    points_furniture,
    points_solids,
    problems,
    ratings,
    text,
    text_downloads,
    toys,
    weather,
)
from coterie.data.catalog import SourceStatus, describe_source, status
from coterie.data.ordering import order
from coterie.data.partition import Partition, Shard, compact, kmeans_partition, shards_of
from coterie.data.source import (
    SOURCES,
    ArraySource,
    SourceConfig,
    SourceInfo,
    Split,
    Subset,
    build_source,
)
from coterie.data.text import ByteTokenizer
from coterie.data.toys import Mixture

__all__ = [
    "SOURCES",
    "ArraySource",
    "ByteTokenizer",
    "Mixture",
    "Partition",
    "Shard",
    "SourceConfig",
    "SourceInfo",
    "SourceStatus",
    "Split",
    "Subset",
    "build_source",
    "compact",
    "describe_source",
    "emoji",
    "fetch",
    "folder",
    "hub_datasets",
    "image_downloads",
    "images",
    "kmeans_partition",
    "latents",
    "movielens",
    "order",
    "photos",
    "points_folder",
    "points_furniture",
    "points_solids",
    "problems",
    "ratings",
    "shards_of",
    "status",
    "text",
    "text_downloads",
    "toys",
    "weather",
]
