"""Floor 1: data sources, the order in which they are seen, and islands cut from them."""

from coterie.data import image_downloads, images, text, text_downloads, toys
from coterie.data.order import order
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
    "SourceConfig",
    "SourceInfo",
    "Split",
    "Subset",
    "build_source",
    "image_downloads",
    "images",
    "order",
    "text",
    "text_downloads",
    "toys",
]
