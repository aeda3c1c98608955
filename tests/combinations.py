"""Combinations that hold every pair of parts that goes together, and walks among them.

What goes together is found by trying (:func:`combination_parts.refusal`); the search for a valid
combination with a given pair looks at the defaults of both and at most one more change.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from functools import cache
from itertools import combinations as subsets
from itertools import product

from combination_parts import TOGETHER, Combination, factors, refusal

Cover = tuple[int, str, int, str]
"""Two factors, the lower first, with what they are (:func:`names`)."""


def changed(combination: Combination, changes: dict[int, int]) -> Combination:
    """With other levels at some factors."""
    return tuple(changes.get(factor, level) for factor, level in enumerate(combination))


def one_away(
    combination: Combination, kept: Collection[int], *, every: bool = False
) -> Iterator[Combination]:
    """Combinations that differ in one factor outside ``kept``; of a kind, its first sample or
    ``every`` one."""
    for place, factor in enumerate(factors()):
        if place not in kept:
            firsts = [factor.kinds.index(kind) for kind in dict.fromkeys(factor.kinds)]
            for level in levels(place) if every else firsts:
                if level != combination[place]:
                    yield changed(combination, {place: level})


@cache
def simplest(place: int, level: int) -> Combination | None:
    """The defaults, or what goes together, with this level and at most one more change."""
    own, default = {place: level}, (0,) * len(factors())
    groups = [group for group in together() if group.get(place) == level]
    for start in (own, *groups):
        first = changed(default, start)
        for found in (first, *one_away(first, start, every=True)):
            if refusal(found) is None:
                return found
    return None


@cache
def together() -> list[dict[int, int]]:
    """TOGETHER as levels by factor."""
    place = {
        f"{f.name}={label}": (i, j)
        for i, f in enumerate(factors())
        for j, label in enumerate(f.labels)
    }
    named = [[f"{name}={label}" for name, label in group.items()] for group in TOGETHER]
    return [dict(place[level] for level in group) for group in named if {*group} <= {*place}]


def merged(first: tuple[int, int], second: tuple[int, int]) -> list[Combination]:
    """Both (factor, level) with what each of them needs, the one's or the other's needs first."""
    both, default = dict((first, second)), (0,) * len(factors())
    bases = [simplest(*first), simplest(*second)]
    assert bases[0] is not None and bases[1] is not None
    needs = [{f: level for f, level in enumerate(base) if level != default[f]} for base in bases]
    return [changed(default, {**a, **b, **both}) for a, b in (needs, needs[::-1])]


@cache
def witness(first: tuple[int, int], second: tuple[int, int]) -> Combination | None:
    """A valid combination with both (factor, level), or None where none is near."""
    starts = merged(first, second)
    tried = (*starts, *one_away(starts[0], dict((first, second)), every=True))
    return next((found for found in tried if refusal(found) is None), None)


def attempt(cover: Cover) -> Combination:
    """The combination that shows best why two do not go together."""
    f, first, g, second = cover
    return merged((f, names()[f][g].index(first)), (g, names()[g][f].index(second)))[0]


@cache
def names() -> list[list[tuple[str, ...]]]:
    """[f][g][level]: what a level of factor f is called beside factor g.

    Samples of a part are told apart beside factors of few levels only.
    """
    return [
        [one.kinds if len(set(other.kinds)) > 3 else one.labels for other in factors()]
        for one in factors()
    ]


@cache
def wanted() -> dict[Cover, Combination | None]:
    """Every pair, with a combination that shows it; None where the two do not go together."""
    shown: dict[Cover, Combination | None] = {}
    works = [[a for a in levels(f) if simplest(f, a)] for f in range(len(factors()))]
    for f, g in subsets(range(len(factors())), 2):
        for a, b in product(works[f], works[g]):
            cover = (f, names()[f][g][a], g, names()[g][f][b])
            if shown.get(cover) is None:
                shown[cover] = witness((f, a), (g, b))
    return shown


def covers(combination: Combination) -> set[Cover]:
    pairs, called = subsets(enumerate(combination), 2), names()
    return {(f, called[f][g][a], g, called[g][f][b]) for (f, a), (g, b) in pairs}


@cache
def covering_array() -> tuple[Combination, ...]:
    """Combinations that contain everything wanted: greedy, and the same on every machine."""
    rng, left = random.Random(0), {cover for cover, shown in wanted().items() if shown}
    rows = []
    for cover, shown in wanted().items():
        if cover in left and shown:
            rows.append(enriched(shown, left, {cover[0], cover[2]}, rng))
            left -= covers(rows[-1])
    return tuple(rows)


def enriched(
    row: Combination, left: set[Cover], kept: Collection[int], rng: random.Random
) -> Combination:
    """``row`` with the factors outside ``kept`` set, one after the other, to what covers most."""
    places = [place for place in range(len(row)) if place not in kept]
    rng.shuffle(places)
    for place in places:
        gains = [(gain(row, place, level, left), level) for level in levels(place)]
        least = gain(row, place, row[place], left)
        for most, level in sorted(gains, reverse=True):
            if most <= least:
                break
            better = changed(row, {place: level})
            if refusal(better) is None:
                row = better
                break
    return row


def levels(place: int) -> range:
    return range(len(factors()[place].labels))


def gain(row: Combination, place: int, level: int, left: set[Cover]) -> int:
    """How much of ``left`` the row would cover through factor ``place`` at ``level``."""
    called, found = names(), 0
    for g, other in enumerate(row):
        own, beside = called[place][g][level], called[g][place][other]
        if g > place:
            found += (place, own, g, beside) in left
        elif g < place:
            found += (g, beside, place, own) in left
    return found


def stroll(seed: int, steps: int) -> Iterator[Combination]:
    """Valid combinations, each one random change away from the one before."""
    rng = random.Random(seed)
    here = rng.choice(covering_array())
    for _ in range(steps):
        place = rng.randrange(len(here))
        near = changed(here, {place: rng.choice(levels(place))})
        here = near if refusal(near) is None else here
        yield here


@cache
def each_level() -> tuple[Combination, ...]:
    """A few combinations that hold every level of every factor: the diagonal of their table."""
    found: dict[Combination, None] = {}
    for level in range(max(len(factor.labels) for factor in factors())):
        row = (0,) * len(factors())
        for place, factor in enumerate(factors()):
            near = changed(row, {place: level % len(factor.labels)})
            row = near if refusal(near) is None else row
        found[row] = None
    held = {level for row in found for level in enumerate(row)}
    for place, factor in enumerate(factors()):
        for level in range(len(factor.labels)):
            row = simplest(place, level)
            if (place, level) not in held and row is not None:
                found[row] = None
                held |= set(enumerate(row))
    return tuple(found)


def told(combination: Combination) -> str:
    """The levels that are not the default, for messages."""
    named = [f"{f.name}={f.labels[level]}" for f, level in zip(factors(), combination) if level]
    return ", ".join(named) or "all defaults"


def reason(message: str) -> str:
    """Why something was refused: what an error says last."""
    return message.rsplit("; ", 1)[-1]
