"""Guidance networks: networks that read pictures, with experts for noise levels."""

from coterie.guides.guide import Guide, GuideConfig, suggested
from coterie.guides.reader import Reader, ReaderConfig
from coterie.guides.tasks import TASKS, height_map, pixel_classes

__all__ = [
    "TASKS",
    "Guide",
    "GuideConfig",
    "Reader",
    "ReaderConfig",
    "height_map",
    "pixel_classes",
    "suggested",
]
