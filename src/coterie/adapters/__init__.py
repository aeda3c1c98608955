"""Adapters: small trained additions to a frozen network, placed by the names of its modules."""

from coterie.adapters.attach import (
    AdapterWarning,
    adapters_of,
    attach,
    base_digest,
    base_tensors,
    configs_of,
    detach,
    fold,
    merge,
    unmerge,
    weigh,
    weights_of,
)
from coterie.adapters.basis import BasisConfig, capacity
from coterie.adapters.checks import Pair, check_together, pairs, room
from coterie.adapters.config import AdapterConfig, LoraConfig
from coterie.adapters.files import load_adapter, read_adapter, save_adapter
from coterie.adapters.layers import Copy, LowRank, Rows, Shift
from coterie.adapters.stacks import Stacks

__all__ = [
    "AdapterConfig",
    "AdapterWarning",
    "BasisConfig",
    "Copy",
    "LoraConfig",
    "LowRank",
    "Pair",
    "Rows",
    "Shift",
    "Stacks",
    "adapters_of",
    "attach",
    "base_digest",
    "base_tensors",
    "capacity",
    "check_together",
    "configs_of",
    "detach",
    "fold",
    "load_adapter",
    "merge",
    "pairs",
    "read_adapter",
    "room",
    "save_adapter",
    "unmerge",
    "weigh",
    "weights_of",
]
