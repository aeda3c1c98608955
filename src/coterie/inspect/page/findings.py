"""Findings about the routers: warnings and plain sentences with the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coterie.inspect.page.relation_sentences import relation_sentences
from coterie.inspect.phrases import bits, expert_name, listing
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.formulas import Information
from coterie.inspect.statistics.routers import FACETS, RouterStats
from coterie.inspect.statistics.trace import Trace

Level = Literal["alarm", "note", "good"]
ABOUT = {
    "noise": "the noise level",
    "class": "the class",
    "position": "the position",
    "task": "the task",
}
EACH = 3
"""Up to so many routers with the same finding are named one by one."""
FEW = 6
"""Up to so many routers get a sentence each; more are described as a whole."""


@dataclass(frozen=True)
class Finding:
    """``alarm``: something is wrong. ``note``: worth knowing, may be meant. ``good``: checked."""

    level: Level
    text: str


@dataclass(frozen=True)
class Check:
    """A test of one router, and how to report one or many that fail it."""

    fails: Callable[[RouterStats], bool]
    level: Callable[[RouterStats], Level]
    one: Callable[[RouterStats], str]
    many: Callable[[Sequence[RouterStats]], str]


def _by_unit(item: RouterStats) -> Level:
    """A router that sees only the noise level may be unequal by construction."""
    return "alarm" if item.unit == "token" else "note"


def _unused(item: RouterStats) -> Level:
    return "alarm" if item.missed else "note"


def _judged(item: RouterStats) -> bool:
    return item.enough and item.num_experts > 1


def _dead_text(item: RouterStats) -> str:
    who, verb = experts(item.dead, names=item.expert_names), "is" if len(item.dead) == 1 else "are"
    return f"Layer {item.name}: {who} {verb} dead (load below 1 % of uniform)."


CHECKS = (
    Check(
        lambda item: item.rows_bad > 0,
        lambda item: "alarm",
        lambda item: (
            f"Layer {item.name}: {item.rows_bad} rows had non-finite router output; "
            "they are not counted."
        ),
        lambda items: (
            f"{len(items)} layers ({layers(items)}): {sum(i.rows_bad for i in items):,} rows had "
            "non-finite router output; they are not counted."
        ),
    ),
    Check(
        lambda item: _judged(item) and item.collapsed,
        _unused,
        lambda item: (
            f"Layer {item.name} has collapsed: "
            f"{experts([int(item.load.argmax())], names=item.expert_names)} receives "
            f"{item.load.max():.1%} of all choices."
        ),
        lambda items: (
            f"{len(items)} layers have collapsed (one expert receives nearly all choices): "
            f"{layers(items)}."
        ),
    ),
    Check(
        lambda item: _judged(item) and bool(item.dead) and not item.collapsed,
        _unused,
        _dead_text,
        lambda items: (
            f"{len(items)} layers have {sum(len(i.dead) for i in items)} dead experts in all "
            f"(load below 1 % of uniform): {layers(items)}."
        ),
    ),
    Check(
        lambda item: (
            _judged(item) and item.entropy < formulas.UNEVEN_ENTROPY and not item.collapsed
        ),
        _by_unit,
        lambda item: (
            f"Layer {item.name} is unevenly loaded: the busiest expert does "
            f"{item.max_over_mean:.1f} times the mean (coefficient of variation {item.cv:.2f})."
        ),
        lambda items: (
            f"{len(items)} layers are unevenly loaded, the busiest expert with up to "
            f"{max(i.max_over_mean for i in items):.1f} times the mean: {layers(items)}."
        ),
    ),
    Check(
        lambda item: not item.enough and item.num_experts > 1,
        lambda item: "note",
        lambda item: (
            f"Layer {item.name}: only {item.rows:,.0f} rows were counted, too few to judge its "
            "load."
        ),
        lambda items: (
            f"{len(items)} layers were counted over too few rows to judge their load: "
            f"{layers(items)}."
        ),
    ),
)


def findings(routers: Sequence[RouterStats]) -> list[Finding]:
    """Broken, collapsed, dead and uneven routers, worst first; like ones are put together."""
    out: list[Finding] = []
    for check in CHECKS:
        failed = [item for item in routers if check.fails(item)]
        levels: tuple[Level, ...] = ("alarm", "note")
        for level in levels:
            same = [item for item in failed if check.level(item) == level]
            texts = [check.one(i) for i in same] if len(same) <= EACH else [check.many(same)]
            out += [Finding(level, text) for text in texts]
    judged = [item for item in routers if _judged(item)]
    if judged and not any(item.dead for item in judged):
        out.append(Finding("good", f"No dead experts in {_routers(len(judged))}."))
    if judged and not any(item.collapsed for item in judged):
        out.append(Finding("good", "No collapsed router."))
    return worst_first(out)


def worst_first(found: Iterable[Finding]) -> list[Finding]:
    order = {"alarm": 0, "note": 1, "good": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def layers(items: Sequence[RouterStats], most: int = 6) -> str:
    """``0, 1, 2 and 5``; after ``most`` only how many more."""
    shown = [item.name for item in items]
    if len(shown) <= most:
        return listing(shown)
    return f"{', '.join(shown[:most])} and {len(shown) - most} more"


def experts(ids: Sequence[int], most: int = 8, names: Sequence[str] = ()) -> str:
    """``expert 3``, ``experts 1, 2 and 5``, shortened after ``most``; by name if they have one."""
    shown = [expert_name(i, names) for i in ids[:most]]
    if len(ids) > most:
        return f"{len(ids)} experts ({', '.join(shown)}, ...)"
    return f"expert {shown[0]}" if len(shown) == 1 else f"experts {listing(shown)}"


def sentences(
    trace: Trace, routers: Sequence[RouterStats], class_names: Sequence[str] = ()
) -> list[str]:
    """What the experts know about noise, class and position, how steady they are, how many a row
    uses, and how layers and rounds depend on each other."""
    if not routers:
        return ["This model is dense: no router made a choice, so there is nothing to divide."]
    out = [_division(routers)]
    if len(routers) <= FEW:
        out += [text for item in routers if (text := _knows(item))]
    else:
        for slot in sorted({item.place.slot for item in routers}):
            same = [item for item in routers if item.place.slot == slot]
            out += [text for facet in FACETS if (text := _trend(same, facet))]
    known = [pair for step in trace.steps.values() if np.isfinite((pair := step.early_late())[0])]
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
    return [*out, *relation_sentences(trace, class_names)]


def _division(routers: Sequence[RouterStats]) -> str:
    units = listing(sorted({f"{item.unit}s" for item in routers}), "or")
    sizes = listing([str(size) for size in sorted({item.num_experts for item in routers})], "or")
    used = sum(item.choices_per_row for item in routers) / len(routers)
    verb = "divides" if len(routers) == 1 else "each divide"
    use = "uses" if len(routers) == 1 else "use"
    text = f"{_routers(len(routers))} {verb} {units} among {sizes} experts"
    return f"{text} and {use} {used:.3g} of them for each."


def _knows(item: RouterStats) -> str:
    """One sentence; what is not above chance is said to be so, without a number."""
    if not item.information or item.num_experts == 1:
        return ""
    ranked = sorted(item.information.items(), key=lambda pair: -pair[1].bits)
    told = [f"{bits(i.corrected)} bits about {ABOUT[f]}" for f, i in ranked if _worth(i)]
    untold = [ABOUT[f] for f, i in ranked if not _worth(i)]
    text = f"In layer {item.name} the choice of expert tells "
    if not told:
        return text + f"nothing measurable about {listing(untold, 'or')}."
    rest = f"; nothing measurable about {listing(untold, 'or')}" if untold else ""
    return f"{text}{listing(told)}{rest}."


def _worth(info: Information) -> bool:
    """Whether there is more to say than 0.00 bits."""
    return info.measurable and bits(info.corrected) != bits(0.0)


def _trend(routers: Sequence[RouterStats], facet: str) -> str:
    """One sentence about many layers: where most, and the two halves of the depth."""
    known = [item for item in routers if facet in item.information and item.num_experts > 1]
    if not known:
        return ""
    values = [i.information[facet] for i in known]
    told = [info.corrected if info.measurable else 0.0 for info in values]
    about = f"{ABOUT[facet]} ({known[0].place.slot}, {len(known)} layers)"
    if max(told) == 0:
        return f"In no layer does the choice of expert tell anything measurable about {about}."
    middle = len(told) // 2
    early = float(np.mean(told[:middle])) if middle else told[0]
    late = float(np.mean(told[middle:]))
    best = int(np.argmax(told))
    return (
        f"About {about} the choice of expert tells {bits(early)} bits in the first half of the "
        f"depth and {bits(late)} in the second; most in layer {known[best].name}, "
        f"{bits(told[best])} bits."
    )


def _routers(count: int) -> str:
    return "One router" if count == 1 else f"{count} routers"
