"""The upcycling recipe: what its arms are made of, and arms that go on from another arm."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coterie.core.config import override
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.recipes import get_recipe, verify
from coterie.recipes.base import Recipe
from coterie.recipes.verify import job_of, run_arm
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.trained_run import load_run
from small_models import IMAGE

SHORT = {
    **IMAGE,
    "model.backbone.trunk.depth": 1,
    "train.steps": 3,
    "train.batch": 8,
    "train.warmup": 0,
    "train.lr": 0.01,
    "sample.steps": 2,
}
GOES_ON = ("continued", "copy", "slice-copy", "unpaired-rows")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe with arms of three steps on tiny digits."""
    found = get_recipe("upcycling")
    arms = {}
    for name, config in found.arms().items():
        init = {} if config.init is None else {"init.upcycle.calibration": 16}
        init = init if config.init is not None and config.init.upcycle is not None else {}
        arms[name] = override(config, {**SHORT, **init})
    monkeypatch.setattr(verify, "get_recipe", lambda name: found)
    object.__setattr__(found, "arms", lambda: arms)
    return found


def test_arms_have_one_network_active_or_two_and_the_mixtures_are_alike() -> None:
    arms = get_recipe("upcycling").arms()
    sizes = {name: count_parameters(build_model(config)) for name, config in arms.items()}
    dense = sizes["dense"]
    assert dense == sizes["continued"]
    for name in ("slice-copy", "unpaired-rows", "scratch"):
        assert sizes[name].active == pytest.approx(dense.active, rel=0.01), name
        assert sizes[name].total == pytest.approx(sizes["copy"].total, rel=0.01), name
    networks = 4 * (2 * 64 * 256 + 256 + 64)
    routers = 4 * 4 * 64
    assert sizes["copy"].active - dense.active == networks + routers
    assert arms["scratch"].model == arms["slice-copy"].model
    assert [name for name, config in arms.items() if config.init is not None] == list(GOES_ON)


def test_presets_say_which_dense_run_they_need() -> None:
    recipe = get_recipe("upcycling")
    tiny, dense = recipe.config("tiny"), get_recipe("dit").config("tiny")
    assert tiny.init is not None and tiny.init.path == "runs/dit"
    own = tiny.model.backbone.trunk
    assert tiny.model.replace(
        backbone=tiny.model.backbone.replace(trunk=own.replace(slots=()))
    ) == dense.model, "`coterie train dit` is the run it needs"  # fmt: skip
    big = recipe.config("paper").model.backbone.trunk
    (slot,) = big.slots
    assert (big.depth, big.width, big.hidden) == (12, 768, 3072)
    assert slot.sites(12) == [6, 7, 8, 9, 10, 11]
    assert (slot.expert.num_experts, slot.expert.router.select.k) == (32, 2)


# Arms that go on from another


def test_folders_depend_on_the_arm_before_and_not_on_where_they_lie(recipe: Recipe) -> None:
    here, there = Path("here"), Path("there")
    dense = job_of(recipe, "dense", 1, here)
    jobs = {arm: job_of(recipe, arm, 1, here) for arm in GOES_ON}
    assert dense.after == ()
    assert len({job.folder for job in (dense, *jobs.values())}) == 5
    for arm, job in jobs.items():
        assert job.after == ("dense",) and job.seed == job.config.seed == 1
        assert job.config.init is not None and job.config.init.path == str(dense.folder)
        assert job_of(recipe, arm, 1, there).folder.name == job.folder.name
        assert job_of(recipe, arm, 2, here).folder.name != job.folder.name
    longer = recipe.arms() | {"dense": override(recipe.arms()["dense"], {"train.steps": 5})}
    object.__setattr__(recipe, "arms", lambda: longer)
    assert job_of(recipe, "copy", 1, here).folder != jobs["copy"].folder


def test_an_arm_before_that_is_none_is_named(recipe: Recipe) -> None:
    lost = recipe.arms()["continued"]
    assert lost.init is not None
    arms = recipe.arms() | {"lost": lost.replace(init=lost.init.replace(path="arm:dence"))}
    object.__setattr__(recipe, "arms", lambda: arms)
    with pytest.raises(ConfigError, match=r"lost: init\.path: 'dence' .*did you mean 'dense'"):
        job_of(recipe, "lost", 0, Path())


def test_an_arm_is_run_after_the_one_it_goes_on_from(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began: list[tuple[bool, int, str]] = []

    def stub(text: str, folder: str) -> dict[str, float]:
        config = RunConfig.from_json(text)
        began.append((config.init is not None, config.seed, folder))
        if config.init is None:
            Path(folder).mkdir(parents=True)
        else:
            assert Path(config.init.path).is_dir(), "the dense run is not there yet"
        return dict.fromkeys(("initial_loss", "held_out_loss"), float(config.seed))

    def threads(max_workers: int, mp_context: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers)

    monkeypatch.setattr(verify, "run_arm", stub)
    monkeypatch.setattr(verify, "train_part", stub)  # of ``dense``: no claim asks about it
    monkeypatch.setattr(verify, "_budget", lambda config: {})
    monkeypatch.setattr(verify, "ProcessPoolExecutor", threads)
    steps: list[tuple[int, int]] = []
    found = verify.verify(
        "upcycling", tmp_path, seeds=2, workers=3, progress=lambda _, *n: steps.append(n)
    )
    assert len({folder for _, _, folder in began}) == len(began) == 12
    assert steps == [(count, 12) for count in range(1, 13)]
    assert found["measures"]["copy"] == [stub_answer(0), stub_answer(1)]
    assert len(found["claims"]) == len(recipe.claims)


def stub_answer(seed: int) -> dict[str, float]:
    return dict.fromkeys(("initial_loss", "held_out_loss"), float(seed))


def test_what_an_arm_starts_from_is_measured_before_it_trains(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from coterie.runs.measure import evaluation

    def measure(run: Any) -> dict[str, float]:
        is_first = run.config.init is None
        return {"held_out_loss": evaluation.held_out(run).loss} if is_first else {}

    monkeypatch.setattr(evaluation, "measure", measure)
    found = {}
    for arm in ("dense", "slice-copy"):
        job = job_of(recipe, arm, 0, tmp_path)
        found[arm] = run_arm(job.config.to_json(), str(job.folder))
    assert "initial_loss" not in found["dense"]
    kept = found["slice-copy"]
    assert kept["initial_loss"] == pytest.approx(found["dense"]["held_out_loss"], rel=1e-5)
    assert 0 <= kept["initial_load_cv"] < 1
    job = job_of(recipe, "slice-copy", 0, tmp_path)
    assert load_run(job.folder).step == 3
    assert run_arm(job.config.to_json(), str(job.folder)) == kept, "finished work is kept"
    (job.folder / "measures.json").unlink()
    again = run_arm(job.config.to_json(), str(job.folder))
    assert again["initial_loss"] == kept["initial_loss"], "also when training has moved on"
    stored = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    assert stored["init"]["origin"]["step"] == 3
