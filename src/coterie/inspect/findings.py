"""From a trace to what a person wants to know: numbers per router, alarms, plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coterie.inspect import stats
from coterie.inspect.stats import Array, Information
from coterie.inspect.tables import HALVES, Joint, Place, RouterTrace
from coterie.inspect.trace import Trace

ENOUGH_CHOICES = 20.0
"""Choices per expert below which an unused expert proves nothing."""
FACETS = ("noise", "class", "position")


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


def names(places: Sequence[Place]) -> list[str]:
    """Short labels, with slot and round only where they differ: ``2``, ``ffn 2``, ``2 round 1``."""
    slots = len({place.slot for place in places}) > 1
    rounds = len({place.round for place in places}) > 1
    return [
        (f"{p.slot} " if slots else "") + str(p.layer) + (f" round {p.round}" if rounds else "")
        for p in places
    ]


def facet_table(router: RouterTrace, facet: str) -> Joint:
    return {"noise": router.noise, "class": router.classes, "position": router.positions}[facet]


def analyse(trace: Trace) -> list[RouterStats]:
    """One :class:`RouterStats` per router, in order of depth; [] for a dense model."""
    routers = trace.routers
    labels = names([router.place for router in routers])
    return [_router_stats(router, name) for router, name in zip(routers, labels)]


def _router_stats(router: RouterTrace, name: str) -> RouterStats:
    half = router.main
    counts, rows = router.counts[half], float(router.rows[half])
    seen = float(router.rows_seen[half])
    found, omitted = _information(router)
    choices = float(counts.sum())
    entropy = stats.confidence_entropy(
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
        load=stats.load_share(counts),
        gate_share=stats.load_share(np.abs(router.gate_mass[half].sum(0))),
        cv=stats.load_cv(counts),
        max_over_mean=stats.max_over_mean(counts),
        entropy=stats.load_entropy(counts),
        confidence=float(entropy),
        dead=stats.dead_experts(counts),
        collapsed=router.num_experts > 1 and choices > 0 and stats.is_collapsed(counts),
        enough=choices >= ENOUGH_CHOICES * router.num_experts,
        always_on=_always_on(router),
        halves_apart=stats.total_variation(router.counts[0], router.counts[1]),
        information=found,
        omitted=omitted,
    )


def _information(router: RouterTrace) -> tuple[dict[str, Information], dict[str, str]]:
    found: dict[str, Information] = {}
    omitted: dict[str, str] = {}
    half = router.main
    draws = stats.effective_draws(
        router.counts[half], float(router.clumping[half]), float(router.clumps[half])
    )
    for facet in FACETS:
        table = facet_table(router, facet)
        if not table.rows[half].any():
            omitted[facet] = table.reason or "no conditional rows"
        elif facet == "class" and half == 1:
            omitted[facet] = "every row is unconditional"
        else:
            # Tokens of one sample share noise level and class; positions vary inside a sample.
            found[facet] = stats.information(
                table.counts[half], None if facet == "position" else draws
            )
    return found, omitted


def _always_on(router: RouterTrace) -> tuple[int, ...]:
    """From the router's own table over all steps where it has one, else from the counts."""
    if router.num_experts == 1:
        return ()
    if router.table is not None:
        return stats.always_on(stats.top_k_usage(router.table, router.top_k))
    half = router.main
    if np.count_nonzero(router.noise.rows[half]) < 2:
        return ()
    return stats.always_on(stats.usage_rate(router.noise.counts[half], router.noise.rows[half]))


@dataclass(frozen=True)
class Finding:
    """``alarm``: something is wrong. ``note``: worth knowing, may be meant. ``good``: checked."""

    level: Literal["alarm", "note", "good"]
    text: str


def findings(routers: Sequence[RouterStats]) -> list[Finding]:
    """Dead, collapsed, uneven and broken routers; one finding per router and kind."""
    out = [finding for item in routers for finding in _router_findings(item)]
    judged = [item for item in routers if item.enough and item.num_experts > 1]
    if judged and not any(item.dead for item in judged):
        out.append(Finding("good", f"No dead experts in {_routers(len(judged))}."))
    if judged and not any(item.collapsed for item in judged):
        out.append(Finding("good", "No collapsed router."))
    order = {"alarm": 0, "note": 1, "good": 2}
    return sorted(out, key=lambda finding: order[finding.level])


def _router_findings(item: RouterStats) -> list[Finding]:
    out: list[Finding] = []
    where = f"Layer {item.name}"
    if item.rows_bad:
        text = f"{where}: {item.rows_bad} rows had non-finite router output; they are not counted."
        out.append(Finding("alarm", text))
    if item.num_experts == 1:
        return out
    if not item.enough:
        text = f"{where}: only {_number(item.rows)} rows were counted, too few to judge its load."
        return [*out, Finding("note", text)]
    # A router that sees only the noise level may be unequal by construction.
    level: Literal["alarm", "note"] = "alarm" if item.unit == "token" else "note"
    if item.collapsed:
        text = f"{where} has collapsed: expert {int(item.load.argmax())} receives "
        out.append(Finding(level, text + f"{item.load.max():.1%} of all choices."))
    if item.dead:
        verb = "is" if len(item.dead) == 1 else "are"
        text = f"{where}: {experts(item.dead)} {verb} dead (load below 1 % of uniform)."
        out.append(Finding(level, text))
    if item.entropy < stats.UNEVEN_ENTROPY and not item.collapsed:
        text = f"{where} is unevenly loaded: the busiest expert does {item.max_over_mean:.1f} times"
        text += f" the mean (coefficient of variation {item.cv:.2f})."
        out.append(Finding(level, text))
    return out


def experts(ids: Sequence[int], most: int = 8) -> str:
    """``expert 3``, ``experts 1, 2 and 5``, shortened after ``most``."""
    shown = [str(i) for i in ids[:most]]
    if len(ids) > most:
        return f"{len(ids)} experts ({', '.join(shown)}, ...)"
    return f"expert {shown[0]}" if len(shown) == 1 else f"experts {listing(shown)}"


def sentences(trace: Trace, routers: Sequence[RouterStats], most: int = 6) -> list[str]:
    """What the experts know about noise, class and position, and how steady they are."""
    if not routers:
        return ["This model is dense: no router made a choice, so there is nothing to divide."]
    out = [_division(routers)]
    ranked = sorted(routers, key=_knowledge, reverse=True)[:most]
    out += [text for item in routers if item in ranked and (text := _knows(item))]
    if len(routers) > most:
        out.append(f"The {most} routers that divide their work most are named; all are below.")
    steady = [(place, *step.early_late()) for place, step in trace.steps.items()]
    known = [(early, late) for _, early, late in steady if np.isfinite(early)]
    if known:
        early, late = np.mean(known, axis=0)
        out.append(
            f"From one sampling step to the next, {early:.0%} of the choices stay the same in the "
            f"first half of sampling and {late:.0%} in the second."
        )
    apart = [item.halves_apart for item in routers if np.isfinite(item.halves_apart)]
    if apart:
        out.append(
            f"Conditional and unconditional rows differ in {np.mean(apart):.0%} of their load "
            "(total variation, mean over layers)."
        )
    return out


def _division(routers: Sequence[RouterStats]) -> str:
    units = listing(sorted({f"{item.unit}s" for item in routers}), "or")
    sizes = listing([str(size) for size in sorted({item.num_experts for item in routers})], "or")
    used = sum(item.choices_per_row for item in routers) / len(routers)
    verb = "divides" if len(routers) == 1 else "each divide"
    text = f"{_routers(len(routers))} {verb} {units} among {sizes} experts"
    return f"{text}; {used:.3g} answer{'s' if used == 1 else ''} on average."


def _knowledge(item: RouterStats) -> float:
    return max((info.bits for info in item.information.values()), default=0.0)


def _knows(item: RouterStats) -> str:
    """One sentence; what is not above chance is said to be so, without a number."""
    if not item.information or item.num_experts == 1:
        return ""
    about = {"noise": "the noise level", "class": "the class", "position": "the position"}
    ranked = sorted(item.information.items(), key=lambda pair: -pair[1].bits)
    told = [f"{i.corrected:.2f} bits about {about[f]}" for f, i in ranked if i.measurable]
    untold = [about[f] for f, i in ranked if not i.measurable]
    text = f"In layer {item.name} the choice of expert tells "
    if not told:
        return text + f"nothing measurable about {listing(untold, 'or')}."
    rest = f"; nothing measurable about {listing(untold, 'or')}" if untold else ""
    return f"{text}{listing(told)}{rest}."


def listing(parts: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _routers(count: int) -> str:
    return "One router" if count == 1 else f"{count} routers"


def _number(value: float) -> str:
    return f"{value:,.0f}"
