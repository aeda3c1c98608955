"""Decentralized diffusion: what the arms may use, and what each is made of."""

from pathlib import Path

import pytest

from coterie.recipes import get_recipe
from coterie.recipes.verify import job_of

RECIPE = get_recipe("ddm")
ARMS = RECIPE.arms()


@pytest.mark.parametrize("by", ["features", "random"])
def test_islands_together_see_as_many_samples_as_one_model(by: str) -> None:
    whole = ARMS["monolith"]
    parts = [ARMS[f"{by}-{index}"] for index in range(4)]
    seen = sum(part.train.steps * part.train.batch for part in parts)
    assert seen == whole.train.steps * whole.train.batch
    assert all(part.model == whole.model for part in parts)
    assert all(part.train.replace(batch=64) == whole.train for part in parts)
    assert [part.data.index for part in parts] == [0, 1, 2, 3]
    assert len({part.data.partition for part in parts}) == 1


def test_the_router_costs_a_quarter_of_the_monolith_and_sees_all_data() -> None:
    router, whole = ARMS["features-router"], ARMS["monolith"]
    assert router.train.steps * 2 == whole.train.steps and router.train.batch == whole.train.batch
    assert router.model.backbone.trunk.depth * 2 == whole.model.backbone.trunk.depth
    assert router.data.index is None and router.model.process == whole.model.process
    assert router.model.backbone.num_classes == whole.model.backbone.num_classes == 0


def test_ensembles_train_nothing_and_name_the_arms_they_are_made_of() -> None:
    made = {"top-1", "full", "sampled", "random"}
    assert {name for name, arm in ARMS.items() if arm.train.steps == 0} == made
    for name in made:
        by = "random" if name == "random" else "features"
        job = job_of(RECIPE, name, 1, Path("runs"))
        assert set(job.after) == {f"{by}-router", *(f"{by}-{index}" for index in range(4))}
        first = job.config.model.members[0].model.path
        assert first == str(job_of(RECIPE, f"{by}-0", 1, Path("runs")).folder)


def test_the_student_is_taught_by_each_samples_own_island() -> None:
    student = ARMS["student"]
    assert student.objective.teacher.ensemble.choice.kind == "oracle"
    assert student.train == ARMS["monolith"].train and student.model == ARMS["monolith"].model
    assert set(job_of(RECIPE, "student", 0, Path("runs")).after) >= {"features-0", "features-3"}


def test_paper_is_the_published_size() -> None:
    trunk = RECIPE.config("paper").model.backbone.trunk
    assert (trunk.depth, trunk.width, trunk.heads) == (28, 1152, 16)
