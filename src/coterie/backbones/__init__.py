"""Backbones: networks with slots for expert layers, and wrappers for networks of other
libraries."""

from coterie.backbones.base import BACKBONES, BackboneOutput
from coterie.backbones.causal import CausalConfig, CausalTransformer
from coterie.backbones.dit import DiT, DiTConfig
from coterie.backbones.multitask import (
    FieldConfig,
    LevelConfig,
    MultiTask,
    MultiTaskConfig,
)
from coterie.backbones.points import MaskConfig, PointsConfig, PointTransformer
from coterie.backbones.policy import Policy, PolicyConfig
from coterie.backbones.restorer import Restorer, RestorerConfig
from coterie.backbones.slots import ExpertHost, SlotConfig
from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.backbones.unet import UNet, UNetConfig

__all__ = [
    "BACKBONES",
    "BackboneOutput",
    "CausalConfig",
    "CausalTransformer",
    "DiT",
    "DiTConfig",
    "ExpertHost",
    "FieldConfig",
    "LevelConfig",
    "MaskConfig",
    "MultiTask",
    "MultiTaskConfig",
    "PointTransformer",
    "PointsConfig",
    "Policy",
    "PolicyConfig",
    "Restorer",
    "RestorerConfig",
    "SlotConfig",
    "Trunk",
    "TrunkConfig",
    "UNet",
    "UNetConfig",
]
