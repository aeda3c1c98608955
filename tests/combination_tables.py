"""What does not go together, and why, as a table for the documentation.

``python tests/combination_tables.py`` writes it to the page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from combination_parts import factors, refusal
from combinations import Cover, attempt, reason, wanted
from coterie.core.sections import update_sections

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "combinations.md"
SECTION = "combinations"
LEFT_OUT = ("model", "expert.num_experts", "slot.names")
"""Factors whose limits are those of others, or of the sizes that are tried here."""


def word(place: int, name: str) -> str:
    """A part by its kind, a field by its name and value."""
    factor = factors()[place]
    field = factor.name.split(".")[-1]
    if factor.is_part or name == field:
        return f"`{name}`"
    return f"`{field}={name}`"


def listing(chosen: Collection[tuple[int, str]]) -> str:
    """Words of some factors; of one factor's parts also all but the few that are missing."""
    said = []
    for place in sorted({place for place, _ in chosen}):
        factor = factors()[place]
        every = dict.fromkeys(factor.kinds)
        own = [word(place, name) for name in every if (place, name) in chosen]
        left = [word(place, name) for name in every if (place, name) not in chosen]
        few = factor.is_part and len(own) > 3 and len(left) <= 2
        said.append(f"all but {' and '.join(left)}" if few else ", ".join(dict.fromkeys(own)))
    return ", ".join(said)


def apart() -> dict[Cover, str]:
    """Pairs of kinds of which no samples go together, and what the attempt to have both says."""
    found: dict[Cover, str] = {}
    together = set()
    for (f, first, g, second), shown in wanted().items():
        pair = (f, kind(f, first), g, kind(g, second))
        if shown is not None:
            together.add(pair)
        elif not {factors()[f].name, factors()[g].name} & set(LEFT_OUT):
            found.setdefault(pair, reason(str(refusal(attempt((f, first, g, second))))))
    return {pair: why for pair, why in found.items() if pair not in together}


def kind(place: int, name: str) -> str:
    factor = factors()[place]
    return name if name in factor.kinds else factor.kinds[factor.labels.index(name)]


def rows() -> Iterator[tuple[str, str, str]]:
    """What, what it does not go with, and why: pairs of one reason in as few lines as may be."""
    groups: dict[tuple[int, str], dict[tuple[int, str], set[str]]] = defaultdict(dict)
    for (f, first, g, second), why in apart().items():
        groups[g, why].setdefault((f, first), set()).add(second)
    for (g, why), found in groups.items():
        for others in dict.fromkeys(map(frozenset, found.values())):
            same = [name for name in found if found[name] == others]
            yield listing(same), listing([(g, name) for name in others]), why


def table() -> str:
    lines = ["| | not with | because |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())])


if __name__ == "__main__":
    update_sections(PAGE, {SECTION: table()})
