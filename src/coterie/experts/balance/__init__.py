"""Load balance: auxiliary losses and bias updates, computed from Routing records."""

from coterie.experts.balance.base import BALANCES, BalancePart
from coterie.experts.balance.contrastive import ContrastiveBalance
from coterie.experts.balance.diffusion_prior import (
    DiffusionPrior,
    jensen_shannon,
    match_columns,
    usage_map,
)
from coterie.experts.balance.load import (
    EntropyLoss,
    NoBalance,
    SelectionBiasUpdate,
    SwitchBalance,
    ZLoss,
)

__all__ = [
    "BALANCES",
    "BalancePart",
    "ContrastiveBalance",
    "DiffusionPrior",
    "EntropyLoss",
    "NoBalance",
    "SelectionBiasUpdate",
    "SwitchBalance",
    "ZLoss",
    "jensen_shannon",
    "match_columns",
    "usage_map",
]
