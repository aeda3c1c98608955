"""Floor 4: one kind of model made into another with the same function: dense into experts."""

from coterie.convert.check import Preserved, check_preserved, compare
from coterie.convert.config import UpcycleConfig
from coterie.convert.model import (
    convert_block,
    feed_forward_inputs,
    upcycle,
    upcycled_config,
    upcycled_slot,
)

__all__ = [
    "Preserved",
    "UpcycleConfig",
    "check_preserved",
    "compare",
    "convert_block",
    "feed_forward_inputs",
    "upcycle",
    "upcycled_config",
    "upcycled_slot",
]
