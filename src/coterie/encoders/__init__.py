"""Frozen networks that turn pictures into features, for metrics and partitions."""

from coterie.encoders.classifier import MapNetwork, SmallClassifier
from coterie.encoders.features import Features, ModuleFeatures
from coterie.encoders.lite0 import Lite0, lite0_extractor, lite0_features, load_lite0

__all__ = [
    "Features",
    "Lite0",
    "MapNetwork",
    "ModuleFeatures",
    "SmallClassifier",
    "lite0_extractor",
    "lite0_features",
    "load_lite0",
]
