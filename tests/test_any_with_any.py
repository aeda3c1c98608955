"""Any router with any expert kind, selection, balance loss and backbone: each pair is trained.

What exists is read off the registries (``combinations``), what each parameter is due is derived
from what the layers did (``combination_rules``), and what does not go together must say why when it
is configured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from combination_parts import (
    NOT_TRIED,
    OWNERS,
    REFUSALS,
    SAMPLES,
    Combination,
    factors,
    missing,
    unusable,
)
from combination_runs import TinySource, build, evaluate, problems, train
from combination_tables import PAGE, SECTION, table
from combinations import covering_array, covers, simplest, stroll, told, wanted
from coterie.core.rng import generator
from coterie.core.sections import section
from coterie.experts import SCORES, ExpertLayer
from coterie.inspect import ReportData, Trace, write_report

RANDOM = 24
"""Full combinations drawn at random, beside those of the array."""
HOUSE_FORM = re.compile(r"[\w.]+: .+ is not allowed; allowed: .+; \w.*", re.DOTALL)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.core.folder.sync", lambda path: None)


def failures(rows: Iterable[Combination], folder: Path) -> list[str]:
    found = []
    for number, row in enumerate(rows):
        wrong = problems(row, folder / str(number))
        found += [f"{told(row)}:\n  " + "\n  ".join(wrong[:8])] if wrong else []
    return found


def with_score(kind: str) -> list[Combination]:
    place = [factor.name for factor in factors()].index("router.score")
    return [row for row in covering_array() if factors()[place].kinds[row[place]] == kind]


# What goes together


@pytest.mark.parametrize("score", SCORES.kinds())
def test_each_pair_trains_saves_loads_and_explains_itself(score: str, tmp_path: Path) -> None:
    rows = with_score(score)
    assert rows, unusable("score", score)
    assert failures(rows, tmp_path) == []


def test_full_combinations_drawn_at_random(tmp_path: Path) -> None:
    drawn = {list(stroll(seed, 60))[-1] for seed in range(RANDOM)}
    assert failures(sorted(drawn - set(covering_array())), tmp_path) == []


def test_every_part_is_usable() -> None:
    """By itself a new part is tried with its defaults; if those cannot work here, say so."""
    fields = {f"{o}.{field}" for o, owner in OWNERS.items() for field in owner.model_fields}
    tried = {factor.name for factor in factors()}
    assert fields - tried == NOT_TRIED, "add the field to BY_HAND in tests/combination_parts.py"
    for place, factor in enumerate(factors()):
        for kind in dict.fromkeys(factor.kinds) if factor.is_part else ():
            levels = [level for level, own in enumerate(factor.kinds) if own == kind]
            given = len(SAMPLES.get(factor.registry, {}).get(kind, [{}]))
            works = [simplest(place, level) is not None for level in levels]
            assert all(works[:given]), unusable(factor.registry, kind)


def test_the_array_holds_every_pair_and_no_other_pair_goes() -> None:
    held = set().union(*map(covers, covering_array()))
    assert held == {pair for pair, shown in wanted().items() if shown}
    for seed in range(10):  # the search for a pair looks near; a walk goes far
        for row in stroll(seed, 60):
            assert covers(row) <= held, told(row)


def test_a_whole_report_of_a_rich_combination(tmp_path: Path) -> None:
    """Rounds, a pool of two layers, reserved experts or many edits: the fullest of the array."""
    row = max(covering_array(), key=lambda row: sum(level > 0 for level in row))
    model = build(row)
    _, recorder = train(model, TinySource(model.config.backbone))
    trace = Trace()
    for step, routings in enumerate(recorder.routings):
        trace.add(routings)
        trace.add_step(step, routings)
    page = write_report(tmp_path, ReportData(title="combination", trace=trace))
    assert page.stat().st_size > 10_000 and len(list(tmp_path.glob("*.png"))) > 3, told(row)


# What does not


def test_a_refusal_names_the_field_and_says_why() -> None:
    assert len(wanted()) > 1000 and len(REFUSALS) > 20
    assert [message for message in sorted(REFUSALS) if not HOUSE_FORM.fullmatch(message)] == []


@pytest.mark.skipif(bool(missing()), reason=f"made with {', '.join(missing())}")
def test_the_page_says_what_goes_with_what() -> None:
    shown = section(PAGE.read_text(encoding="utf-8"), SECTION)
    assert shown == table(), "run python tests/combination_tables.py"


# Gradients are derivatives


def smooth(row: Combination) -> bool:
    """Whether the gradient is meant to be the derivative, and every step of it has a float64."""
    levels = {factor.name: factor.labels[level] for factor, level in zip(factors(), row)}
    stopped = "detach=True" in levels["router.score"]
    exact = levels["expert.dispatch"] in ("loop", "dense", "sorted")
    return exact and levels["router.weight"] != "straight_through" and not stopped


def value(model: Any, source: TinySource, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A number that depends on everything, and the choices it was made with."""
    x, t, cond = source.call(model)
    prediction = model(x if source.words else x.double(), t.double(), cond)
    aux = model.aux_losses(prediction.routings, generator(0))
    total = (prediction.value * weights).sum() + sum(term.weight * term.value for term in aux)
    return total, [routing.ids for routing in prediction.routings]


@pytest.mark.parametrize("score", SCORES.kinds())
def test_gradients_equal_finite_differences(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a random direction in the routers' and in the experts' parameters, in float64."""
    row = next(row for row in with_score(score) if smooth(row))
    model = build(row).eval()
    source = TinySource(model.config.backbone)
    shape = evaluate(model, source)[0].shape
    # Routers and balance losses calculate in float32, by name; here that name is float64.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    model = model.double()
    weights = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    total, ids = value(model, source, weights)
    total.backward()
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    for own in (
        [p for x in layers for p in x.routers.parameters()],
        [*layers[0].pool.parameters()],
    ):
        moved = list({id(p): p for p in own if p.grad is not None}.values())
        along = [torch.randn(p.shape, generator=generator(2), dtype=p.dtype) for p in moved]
        expected = sum(float((p.grad * d).sum()) for p, d in zip(moved, along))
        ends = []
        for step in (1e-6, -2e-6, 1e-6):
            ends.append(value(model, source, weights))
            for p, d in zip(moved, along):
                p.data.add_(d, alpha=step)
        found = (ends[1][0] - ends[2][0]).item() / 2e-6
        assert all(torch.equal(a, b) for end in ends for a, b in zip(end[1], ids))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7), told(row)
