"""Verdicts from numbers: when a claim counts as shown, and what the table says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.recipes.base import Claim, get_recipe
from coterie.recipes.tables import claims_table
from coterie.recipes.verify import _claimed, job_of, judge

MEASURED = {
    "a": [{"loss": 1.0, "easy": 1.2}, {"loss": 1.1, "easy": 1.25}, {"loss": 0.9, "easy": 1.3}],
    "b": [{"loss": 1.5}, {"loss": 1.5}, {"loss": 1.6}],
}


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        (Claim("lower", "loss", "a", "b"), True),
        (Claim("lower", "loss", "b", "a"), False),
        (Claim("higher", "loss", "b", "a", better="higher"), True),
        (Claim("by a third", "loss", "a", "b", factor=0.75), True),
        (Claim("by half", "loss", "a", "b", factor=0.5), False),
        (Claim("no worse", "loss", "b", "a", tolerance=0.8), True),
        (Claim("no worse", "loss", "b", "a", tolerance=0.3), False),
        (Claim("below a number", "loss", "a", target=1.2), True),
        (Claim("one seed disagrees", "loss", "a", target=1.05), False),
        (Claim("two metrics of one arm", "easy", "a", against="loss", better="higher"), True),
        (Claim("of two arms", "easy", "a", "b", against="loss"), True),
    ],
)
def test_every_seed_must_agree_and_the_mean_exceed_the_spread(claim: Claim, shown: bool) -> None:
    assert judge(claim, MEASURED)["shown"] is shown


def test_a_scattered_difference_is_not_shown_although_every_seed_agrees() -> None:
    runs = {"a": [{"x": 0.0}] * 3, "b": [{"x": 0.1}, {"x": 0.1}, {"x": 3.0}]}
    verdict = judge(Claim("", "x", "a", "b"), runs)
    assert min(verdict["per_seed"]["baseline"]) > 0 and verdict["spread"] > verdict["baseline"]
    assert verdict["shown"] is False


def test_the_table_names_both_metrics_where_they_differ() -> None:
    claims = [
        Claim("hard needs more", "easy", "a", against="loss", better="higher"),
        Claim("lower", "loss", "a", "b"),
    ]
    found = [judge(claim, MEASURED) for claim in claims]
    assert found[0]["arms"] == ["a", "a"] and found[1]["arms"] == ["a", "b"]
    assert judge(Claim("", "loss", "a", target=1.2), MEASURED)["arms"] == ["a", "target"]
    machine = {"cpu": "x", "cores": 1, "torch": "y"}
    result = {"recipe": "r", "claims": found, "commit": "c", "hardware": machine, "rule": "rule"}
    rows = claims_table([result]).splitlines()[2:4]
    assert "| easy against loss (higher is better) | 1.25 | 1 |" in rows[0]
    assert "| loss (lower is better) | 1 | 1.533 |" in rows[1]


def test_what_only_others_are_made_of_is_not_measured() -> None:
    recipe = get_recipe("upcycling")
    asked = _claimed(recipe)
    assert "dense" not in asked and {"continued", "copy", "slice-copy"} <= asked
    assert job_of(recipe, "copy", 0, Path("runs")).after == ("dense",)
