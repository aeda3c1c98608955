"""HoME's arms: equal sizes, one mechanism apart, and noise levels as tasks in a denoiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coterie.core.config import override
from coterie.core.cost import count_parameters
from coterie.core.routing import Routing
from coterie.recipes import home
from coterie.runs.build import build_model
from coterie.runs.measure.evaluation import measure
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from small_models import IMAGE, images

SHORT = {"train.steps": 2, "train.batch": 64, "train.threads": 1, "train.warmup": 0}


@pytest.mark.parametrize("arm", list(home.arms()))
def test_arms_of_a_modality_have_equal_parameters(arm: str) -> None:
    arms = home.arms()
    ours = arms["image-home" if arm.startswith("image") else "home"]
    found, wanted = (count_parameters(build_model(c)).total for c in (arms[arm], ours))
    assert found == pytest.approx(wanted, rel=0.02)


def test_ablations_change_one_thing() -> None:
    whole = home.ratings(home.HOME).model.backbone
    for name, parts in home.WITHOUT.items():
        other = home.ratings(parts).model.backbone
        changed = {f for f in type(whole).model_fields if getattr(whole, f) != getattr(other, f)}
        # Another width makes up for the parameters of the feature gates.
        wanted = {
            "no-norm": {"expert"},
            "no-mask": {"mask"},
            "no-feature-gate": {"expert", "levels"},
            "no-self-gate": {"self_gate"},
        }
        assert changed == wanted[name]


@pytest.mark.parametrize("arm", ["home", "ple"])
def test_a_ratings_arm_is_measured_by_what_its_claims_ask(arm: str, tmp_path: Path) -> None:
    config = override(home.arms()[arm], SHORT)
    found = measure(load_run(start(config, tmp_path / "run", progress=False)))
    asked = {claim.metric for claim in home.CLAIMS if arm in (claim.ours, claim.baseline)}
    assert len(asked) == 3 and all(0.3 < found[metric] < 0.9 for metric in asked)
    assert found["dropped_users/eq1"] > found["dropped_users/ge4"] > 0


def routings_at(steps: list[int]) -> tuple[Routing, ...]:
    model = build_model(override(home.arms()["image-home"], IMAGE)).eval()
    batch = images(len(steps))
    t = model.process.time_of_unit(torch.tensor(steps) / 1000)
    found: tuple[Routing, ...] = model(batch.x, t, batch.cond).routings
    return found


def test_a_noise_level_sees_its_own_experts_those_of_its_half_and_the_shared_one() -> None:
    """Experts: 0 shared, 1 and 2 of the halves, 3 to 6 of the four bins."""
    sees = {0: [0, 1, 3], 1: [0, 1, 4], 2: [0, 2, 5], 3: [0, 2, 6]}
    for routing in routings_at([10, 300, 600, 990]):
        assert routing.task.tolist() == [0, 1, 2, 3]
        probs = routing.probs.unflatten(0, (4, -1))
        for task, seen in sees.items():
            open_ = (probs[task] > 0).all(0).nonzero().flatten()
            assert open_.tolist() == seen
            extra = routing.gates.unflatten(0, (4, -1))[task] - probs[task]
            own = 3 + task
            assert (extra[:, own] > 0).all() and (extra[:, own] < 1).all()


def test_an_image_arm_trains(tmp_path: Path) -> None:
    short = {**SHORT, **IMAGE, "train.batch": 16, "sample.steps": 1}
    config = override(home.arms()["image-home"], short)
    run = load_run(start(config, tmp_path / "run", progress=False))
    moved = [name for name, buffer in run.model.named_buffers() if name.endswith("pool.mean")]
    assert len(moved) == config.model.backbone.trunk.depth
    assert all(run.model.get_buffer(name).abs().sum() > 0 for name in moved)
