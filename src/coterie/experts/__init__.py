"""Expert layers: routers, dispatch to experts, combination, and load-balance losses."""

from coterie.experts.balance import BALANCES
from coterie.experts.dispatch import DispatchPlan, dispatch, plan
from coterie.experts.kinds import EXPERTS, ExpertKind, ExpertPool
from coterie.experts.layer import ExpertLayer, ExpertLayerConfig, ExpertOutput, routers_of
from coterie.experts.routers import EDITS, SCORES, SELECTS, Router, RouterConfig, share_cells
from coterie.experts.segmentation import Segmentation, layer_cost, multiply_adds
from coterie.experts.shared import SharedConfig, SharedExperts

__all__ = [
    "BALANCES",
    "EDITS",
    "EXPERTS",
    "SCORES",
    "SELECTS",
    "DispatchPlan",
    "ExpertKind",
    "ExpertLayer",
    "ExpertLayerConfig",
    "ExpertOutput",
    "ExpertPool",
    "Router",
    "RouterConfig",
    "Segmentation",
    "SharedConfig",
    "SharedExperts",
    "dispatch",
    "layer_cost",
    "multiply_adds",
    "plan",
    "routers_of",
    "share_cells",
]
