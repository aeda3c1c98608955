"""Conversions of models that keep the function: dense to experts, own to shared pools, norms to
maps."""

from coterie.convert.check import Preserved, check_preserved, compare
from coterie.convert.config import UpcycleConfig
from coterie.convert.model import (
    convert_block,
    feed_forward_inputs,
    upcycle,
    upcycled_config,
    upcycled_slot,
)
from coterie.convert.norms import fold_norms, folded_config
from coterie.convert.pools import extend_reuse, extended_config, untie, untied_config

__all__ = [
    "Preserved",
    "UpcycleConfig",
    "check_preserved",
    "compare",
    "convert_block",
    "extend_reuse",
    "extended_config",
    "feed_forward_inputs",
    "fold_norms",
    "folded_config",
    "untie",
    "untied_config",
    "upcycle",
    "upcycled_config",
    "upcycled_slot",
]
