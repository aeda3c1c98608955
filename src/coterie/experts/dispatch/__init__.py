"""Dispatch: sending rows to their experts, by a plan made from a Routing and one of several
backends."""

from coterie.experts.dispatch.auto import choose, dispatch
from coterie.experts.dispatch.backends import BACKENDS, available
from coterie.experts.dispatch.plan import DispatchPlan, plan, plan_choices

__all__ = ["BACKENDS", "DispatchPlan", "available", "choose", "dispatch", "plan", "plan_choices"]
