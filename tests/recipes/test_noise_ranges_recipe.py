"""Experts of noise ranges: equal totals of samples, ranges that meet, one base."""

from pathlib import Path

import pytest

from coterie.process import share_within
from coterie.recipes import get_recipe
from coterie.recipes.verify import job_of

RECIPE = get_recipe("noise-ranges")
ARMS = RECIPE.arms()


@pytest.mark.parametrize(("name", "count"), [("pair", 2), ("four", 4), ("alone", 2)])
def test_experts_together_see_what_one_model_sees(name: str, count: int) -> None:
    parts = [ARMS[f"{name}-{index}"] for index in range(count)]
    seen = sum(part.train.steps * part.train.batch for part in parts)
    whole = [ARMS["monolith"], ARMS["base"]] if name == "alone" else [ARMS["monolith"]]
    assert seen == sum(arm.train.steps * arm.train.batch for arm in whole)
    process = parts[0].model.process.build()
    shares = [share_within(part.objective.times, process) for part in parts]
    assert shares == pytest.approx([1 / count] * count, abs=0.03) and sum(shares) == 1


@pytest.mark.parametrize(("name", "count"), [("pair", 2), ("four", 4), ("alone", 2)])
def test_the_noisiest_comes_first_and_answers_down_to_its_boundary(name: str, count: int) -> None:
    edges = ARMS[name].model.ensemble.boundaries
    parts = [ARMS[f"{name}-{index}"].objective.times for index in range(count)]
    assert [part.low for part in parts] == [*edges, None]
    assert [part.high for part in parts] == [None, *edges]
    job = job_of(RECIPE, name, 0, Path("runs"))
    assert job.after == tuple(f"{name}-{index}" for index in range(count))
    first = job_of(RECIPE, f"{name}-0", 0, Path("runs"))
    assert first.after == (() if name == "alone" else ("base",))
