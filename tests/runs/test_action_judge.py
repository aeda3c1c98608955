"""Runs of policies: roll-outs with success rates, their pictures, and their report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.core.config import override
from coterie.core.errors import CheckpointError, ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.data.worlds.obstacle import ObstacleSimulator
from coterie.hub import load_pretrained
from coterie.recipes import get_recipe
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.judges import judge_of
from coterie.runs.judges.action import ActionJudge
from coterie.runs.measure.evaluation import measure
from coterie.runs.measure.report import report_run
from coterie.runs.sample.rollouts import RolledOut, both_ways, demonstrator, roll_out
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import start
from coterie.train import TrainConfig, Trainer

SHORT = {
    "data.episodes": 16,
    "train.steps": 3,
    "train.batch": 4,
    "train.threads": 1,
    "sample.steps": 2,
    "model.backbone.trunk.depth": 1,
}


def tiny() -> RunConfig:
    return override(get_recipe("mode-policy").config(), SHORT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return load_run(start(tiny(), tmp_path_factory.mktemp("policy") / "run", progress=False))


def judge(run: LoadedRun) -> ActionJudge:
    found = judge_of(run)
    assert isinstance(found, ActionJudge)
    return found


def test_the_numbers_of_a_run(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.runs.judges.action.MOST", 12)
    found = measure(run)
    assert found["success_floor"] == 1.0
    assert 0 <= found["success_low"] <= found["success"] <= found["success_high"] <= 1
    assert found["held_out_loss"] > 0 and 0 <= found["mode_coverage"] <= 1
    assert found["cached_flops_per_call"] < found["flops_per_call"]
    assert found["cached_flops_per_call"] < 0.7 * found["all_experts_flops_per_call"]
    assert found["cache_difference"] < 1e-5


def test_held_out_loss_is_the_error_of_the_network_itself(run: LoadedRun) -> None:
    """EDM's weight cancels the preconditioning: |D - a|^2 lambda = |F - target|^2."""
    batch, process = judge(run)._moments(6), run.model.process
    error, prediction = judge(run).at(batch, 0.6, torch.Generator().manual_seed(0))
    sigma = process.time_of_unit(torch.full((6,), 0.6))
    eps = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0))
    _, c_skip, c_out = (c[:, None, None] for c in run.model.precondition.coefficients(sigma))
    noisy = batch.x + sigma[:, None, None] * eps
    answer, target = (prediction.value - c_skip * noisy) / c_out, (batch.x - c_skip * noisy) / c_out
    assert torch.allclose(error, (answer - target).square().flatten(1).mean(1), rtol=1e-3)


def test_an_episode_does_not_depend_on_the_others(run: LoadedRun) -> None:
    four, two = judge(run).draw(4), judge(run).draw(2)
    assert isinstance(four, RolledOut) and four.seeds[:2] == two.seeds
    steps = int(two.rollouts.steps[0])
    assert np.allclose(four.rollouts.paths[0, :steps], two.rollouts.paths[0, :steps], atol=1e-5)
    other = judge(run).draw(2, seed=1)
    assert not np.allclose(other.rollouts.paths[0, 0], two.rollouts.paths[0, 0])


def test_cached_episodes_are_the_same(run: LoadedRun) -> None:
    plain, cached = (judge(run).draw(4, cached=value) for value in (False, True))
    assert torch.allclose(plain.x, cached.x, atol=1e-4)


def test_goals_can_be_chosen_and_are_checked(run: LoadedRun) -> None:
    made = judge(run).draw(3, labels=[2])
    assert made.labels.tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"labels: 4 .*0\.\.3"):
        judge(run).draw(3, labels=[4])
    with pytest.raises(ConfigError, match=r"num: 0 .*1 or more"):
        judge(run).draw(0)


def test_a_policy_that_answers_nan_is_named() -> None:
    def broken(seen: np.ndarray, number: int) -> np.ndarray:
        actions = np.zeros((2, 8, 2), np.float32)
        actions[1, 3] = np.nan if number else 0.0
        return actions

    with pytest.raises(DataError, match="chunk 1 of episode 1: holds NaN"):
        roll_out(ObstacleSimulator(), broken, [0, 1], [0, 1])
    with pytest.raises(ConfigError, match=r"seeds: 1 .*2, one per goal"):
        roll_out(ObstacleSimulator(), broken, [0, 1], [0])


def test_ways_are_counted_by_start() -> None:
    simulator = ObstacleSimulator()
    seeds = list(range(40))
    rolled = roll_out(simulator, demonstrator(simulator), [0] * 40, seeds)
    assert rolled.success.all() and both_ways(rolled, 40) == 1.0 and both_ways(rolled, 1) == 0.0
    assert (rolled.steps < simulator.limit).all() and rolled.paths.shape[0] == 40


def test_chunks_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(8, 2\) .*\(5, 2\)"):
        build_source(override(tiny(), {"data.horizon": 5}))
    with pytest.raises(ConfigError, match=r"observations: \(1, 6\) .*\(1, 4\)"):
        build_source(override(tiny(), {"model.backbone.observation_size": 6}))
    with pytest.raises(ConfigError, match=r"num_classes: 3 .*4"):
        build_source(override(tiny(), {"model.backbone.num_classes": 3}))


def test_samples_are_a_sheet_an_animation_and_what_happened(run: LoadedRun, tmp_path: Path) -> None:
    shown = sample_run(run, 5, out=tmp_path)
    assert shown.name == "grid.png" and Image.open(shown).size[0] > 100
    assert Image.open(tmp_path / "rollouts.gif").n_frames > 3
    entries = json.loads((tmp_path / "samples.json").read_text())
    assert [entry["label"] for entry in entries] == [0, 1, 2, 3, 0]
    assert all({"success", "steps", "way", "seed"} <= entry.keys() for entry in entries)


def test_the_report_shows_episodes(run: LoadedRun, tmp_path: Path) -> None:
    html = report_run(run.path, tmp_path, progress=False).read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "samples.png").is_file() and "starts from which both ways are taken" in html
    assert numbers["metrics"]["success"]["floor"] == 1.0 and numbers["num_samples"] == 64
    assert len(numbers["routing"]["routers"]) == 1


def test_episodes_without_a_simulator_give_chunks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"observations": rng.normal(size=(30, 4)), "actions": rng.uniform(-1, 1, (30, 2))}
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays, lengths=np.full(6, 5), goals=np.arange(6) % 4)
    data = {"kind": "demonstrations", "path": str(path), "num_goals": 4}
    config = override(tiny().replace(data=data), {"train.steps": 1})
    loaded = load_run(start(config, tmp_path / "run", progress=False))
    found = measure(loaded)
    assert "success" not in found and found["cache_difference"] < 1e-5
    made = judge(loaded).draw(3)
    assert made.x.shape == (3, 8, 2) and judge(loaded).show(made) is None
    assert sample_run(loaded, 3, out=tmp_path / "out").name == "samples.npy"


def test_fine_tuning_leaves_routers_as_they_are(run: LoadedRun, tmp_path: Path) -> None:
    changes = {"init": {"path": str(run.path)}, "train.freeze": ["*.routers.*"], "train.steps": 2}
    tuned = load_run(start(override(tiny(), changes), tmp_path / "tuned", progress=False))
    before, after = run.model.state_dict(), tuned.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".routers." in name}
    assert same and load_pretrained(tuned.path / "model").state_dict().keys() == before.keys()


def test_freezing_needs_a_name_that_exists() -> None:
    config = TrainConfig(steps=1, freeze=("*.router.*",))
    with pytest.raises(ConfigError, match=r"train\.freeze: '\*\.router\.\*' .*no module"):
        Trainer(config, build_model(tiny()), None, None)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError)):
        load_run(tmp_path / "nothing")


def test_goal_dropout_keeps_the_observation() -> None:
    source = build_source(tiny())
    cond = source.get([0, 1]).cond.drop(torch.tensor([True, False]))
    assert isinstance(cond, Condition) and cond.label.tolist()[0] == -1
    assert torch.equal(cond.tokens, source.get([0, 1]).cond.tokens)
