"""From a trace to numbers: one record per router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.core.routing import ENSEMBLE
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.accumulators import (
    HALVES,
    Joint,
    Place,
    RouterTrace,
    layer_name,
    several_slots,
)
from coterie.inspect.statistics.formulas import Array, Information
from coterie.inspect.statistics.trace import Trace

ENOUGH_CHOICES = 20.0
"""Choices per expert below which an unused expert proves nothing."""
FACETS = ("noise", "class", "position", "task")


@dataclass(frozen=True, eq=False)
class RouterStats:
    """Numbers of one router, over its conditional rows (``half`` says if it had none)."""

    place: Place
    name: str
    unit: str
    num_experts: int
    half: str
    rows: float
    rows_scored: float  # share of the rows seen that the router scored
    rows_bad: int
    samples: float
    choices_per_row: float
    load: Array  # [E] share of choices
    gate_share: Array  # [E] share of gate weight (absolute)
    cv: float
    max_over_mean: float
    entropy: float  # of the load, over log E
    confidence: float  # mean entropy of a row's probabilities, over log E
    dead: tuple[int, ...]
    collapsed: bool
    enough: bool  # enough choices to judge dead experts and imbalance
    always_on: tuple[int, ...]
    halves_apart: float  # total variation between the two halves' loads, NaN without both
    information: dict[str, Information]  # facet -> bits; a facet without data is absent
    omitted: dict[str, str]  # facet -> why it is absent
    expert_names: tuple[str, ...] = ()  # () = numbers

    @property
    def missed(self) -> bool:
        """Whether an expert that nobody chooses is a fault: a member of an ensemble is, and an
        expert of tokens. A router that sees only the noise level may leave one out by construction.
        """
        return self.unit == "token" or self.place.slot == ENSEMBLE


def names(routers: Sequence[RouterTrace]) -> list[str]:
    """Short labels, with slot and round only where they differ: ``2``, ``ffn 2``, ``2 round 1``.

    Places with a name of their own keep it: ``mid.0.conv1``.
    """
    rounds = len({router.place.round for router in routers}) > 1
    slots = several_slots(routers)
    return [
        layer_name(router, slots) + (f" round {router.place.round}" if rounds else "")
        for router in routers
    ]


def facet_table(router: RouterTrace, facet: str) -> Joint:
    return {
        "noise": router.noise,
        "class": router.classes,
        "position": router.positions,
        "task": router.tasks,
    }[facet]


def analyse(trace: Trace) -> list[RouterStats]:
    """One :class:`RouterStats` per router, in order of depth; [] for a dense model."""
    routers = trace.routers
    labels = names(routers)
    return [_router_stats(router, name) for router, name in zip(routers, labels)]


def _router_stats(router: RouterTrace, name: str) -> RouterStats:
    half = router.main
    counts, rows = router.counts[half], float(router.rows[half])
    seen = float(router.rows_seen[half])
    found, omitted = _information(router)
    choices = float(counts.sum())
    entropy = formulas.confidence_entropy(
        router.entropy[half].sum(), router.entropy_rows[half].sum(), router.num_experts
    )
    return RouterStats(
        place=router.place,
        name=name,
        unit=router.unit,
        num_experts=router.num_experts,
        half=HALVES[half],
        rows=rows,
        rows_scored=rows / seen if seen else 0.0,
        rows_bad=router.rows_bad,
        samples=float(router.samples[half]),
        choices_per_row=choices / rows if rows else 0.0,
        load=formulas.load_share(counts),
        gate_share=formulas.load_share(np.abs(router.gate_mass[half].sum(0))),
        cv=formulas.load_cv(counts),
        max_over_mean=formulas.max_over_mean(counts),
        entropy=formulas.load_entropy(counts),
        confidence=float(entropy),
        dead=formulas.dead_experts(counts),
        collapsed=router.num_experts > 1 and choices > 0 and formulas.is_collapsed(counts),
        enough=choices >= ENOUGH_CHOICES * router.num_experts,
        always_on=_always_on(router),
        halves_apart=formulas.total_variation(router.counts[0], router.counts[1]),
        information=found,
        omitted=omitted,
        expert_names=router.expert_names,
    )


def _information(router: RouterTrace) -> tuple[dict[str, Information], dict[str, str]]:
    found: dict[str, Information] = {}
    omitted: dict[str, str] = {}
    half = router.main
    draws = formulas.effective_draws(
        router.counts[half], float(router.clumping[half]), float(router.clumps[half])
    )
    for facet in FACETS:
        table = facet_table(router, facet)
        if facet == "task" and not table.columns:
            continue  # most models have none, and nobody looks for them
        if not table.rows[half].any():
            omitted[facet] = table.reason or "no conditional rows"
        elif facet == "noise" and not router.noise.varies:
            omitted[facet] = "all rows have one noise level"
        elif facet == "class" and half == 1:
            omitted[facet] = "every row is unconditional"
        else:
            # Tokens of one sample share noise level and class; positions vary inside a sample.
            found[facet] = formulas.information(
                table.counts[half], None if facet == "position" else draws
            )
    return found, omitted


def _always_on(router: RouterTrace) -> tuple[int, ...]:
    """From the router's own table over all steps where it has one, else from the counts."""
    if router.num_experts == 1:
        return ()
    if router.table is not None:
        return formulas.always_on(formulas.top_k_usage(router.table, router.top_k))
    half = router.main
    if np.count_nonzero(router.noise.rows[half]) < 2:
        return ()
    return formulas.always_on(
        formulas.usage_rate(router.noise.counts[half], router.noise.rows[half])
    )
