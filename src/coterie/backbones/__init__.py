"""Floor 3: one transformer trunk with expert slots, and the backbones built on it."""

from coterie.backbones.base import BACKBONES, BackboneOutput
from coterie.backbones.causal import CausalConfig, CausalTransformer
from coterie.backbones.dit import DiT, DiTConfig
from coterie.backbones.points import MaskConfig, PointsConfig, PointTransformer
from coterie.backbones.restorer import Restorer, RestorerConfig
from coterie.backbones.trunk import SlotConfig, Trunk, TrunkConfig

__all__ = [
    "BACKBONES",
    "BackboneOutput",
    "CausalConfig",
    "CausalTransformer",
    "DiT",
    "DiTConfig",
    "MaskConfig",
    "PointTransformer",
    "PointsConfig",
    "Restorer",
    "RestorerConfig",
    "SlotConfig",
    "Trunk",
    "TrunkConfig",
]
