"""Orthogonal Adaptation: concepts apart, equal budgets, room for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.adapters import adapters_of, pairs, room
from coterie.core.config import override
from coterie.core.cost import count_parameters
from coterie.recipes import get_recipe, orthogonal_adaptation
from coterie.recipes.verify import job_of
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

RECIPE = get_recipe("orthogonal-adaptation")
ARMS = RECIPE.arms()
CONCEPTS = orthogonal_adaptation.CONCEPTS


def trained(arm: str) -> int:
    model = build_model(ARMS[arm])
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_concept_is_learnt_apart_and_none_is_in_the_base() -> None:
    assert not set(ARMS["base"].data.classes) & set(CONCEPTS)
    for kind in ("orthogonal", "plain", "fewer"):
        for concept in CONCEPTS:
            arm = ARMS[f"{kind}-{concept}"]
            own = set(arm.data.classes) - set(ARMS["base"].data.classes)
            assert own == {concept}
            assert arm.init is not None and arm.init.path == "arm:base"
            (adapter,) = arm.init.adapters
            assert adapter.lora is not None and adapter.lora.rows == (concept,)


def test_slots_differ_and_all_of_them_fit() -> None:
    slots = []
    for concept in CONCEPTS:
        (parts,) = adapters_of(build_model(ARMS[f"orthogonal-{concept}"])).values()
        slots.append(next(iter(parts.values())).config.basis)
        assert (room(parts) or 0) >= len(CONCEPTS)
    assert [basis.index for basis in slots if basis is not None] == list(range(len(CONCEPTS)))
    assert len({basis.hash for basis in slots if basis is not None}) == 1


def test_baselines_have_equal_rank_or_equal_parameters() -> None:
    ours, plain, fewer = (trained(f"{kind}-6") for kind in ("orthogonal", "plain", "fewer"))
    assert ours == pytest.approx(fewer, rel=0.06)
    assert plain > 1.4 * ours
    assert count_parameters(build_model(ARMS["base"])).total > 10 * ours
    steps = {ARMS[f"{kind}-6"].train.steps for kind in ("orthogonal", "plain", "fewer")}
    assert steps == {orthogonal_adaptation.STEPS}
    assert ARMS["joint-training"].train.steps == len(CONCEPTS) * orthogonal_adaptation.STEPS


def test_sums_are_made_of_what_their_arms_have_learnt(tmp_path: Path) -> None:
    short = {"train.batch": 4, "train.warmup": 0, "train.threads": 1}
    for arm in ("base", *(f"orthogonal-{concept}" for concept in CONCEPTS), "orthogonal"):
        job = job_of(RECIPE, arm, 0, tmp_path)
        steps = min(job.config.train.steps, 2)
        start(override(job.config, {**short, "train.steps": steps}), job.folder, progress=False)
    run = load_run(job_of(RECIPE, "orthogonal", 0, tmp_path).folder)
    assert isinstance(run.config, RunConfig) and run.source.classes == CONCEPTS  # type: ignore[attr-defined]
    found = pairs(adapters_of(run.model))
    assert len(found) == 6 and max(pair.update_overlap for pair in found) < 1e-5
