"""Runs of noise ranges joined: whose answer it is, found boundaries, what is refused."""

import json

import pytest
import torch

from coterie.cli.main import run as cli
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.recipes.common import image_tiny
from coterie.runs.origins.noise_ranges import find_boundaries, join_ranges
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

SMALL = {"depth": 1, "width": 16, "heads": 2}


def base(steps=3, seed=0, **changes):
    config = image_tiny("dit", steps=steps, trunk=SMALL, batch=8, threads=1, **changes)
    backbone = config.model.backbone.replace(image_size=8, patch=4)
    model = config.model.replace(backbone=backbone)
    sample = config.sample.replace(steps=4)
    return config.replace(data={"kind": "digits"}, model=model, sample=sample, seed=seed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    noisy = {"times": {"kind": "within", "times": "logit_normal", "low": 0.5}}
    clean = {"times": {"kind": "within", "times": "logit_normal", "high": 0.5}}
    start(base(60, objective=noisy), folder / "noisy", progress=False)
    start(base(60, 1, objective=clean), folder / "clean", progress=False)
    return folder


def test_each_range_has_its_own_answer(runs, tmp_path):
    out = join_ranges([runs / "noisy", runs / "clean"], [0.5], tmp_path / "pair")
    pair = load_run(out)
    assert pair.config.objective.times.kind == "logit_normal", "of the whole, not of a range"
    batch = pair.source.get([0, 1, 2, 3])
    t = torch.tensor([0.9, 0.5, 0.49, 0.1])
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        found = pair.model(x, t, batch.cond)
        for rows, name in (([0, 1], "noisy"), ([2, 3], "clean")):
            alone = load_run(runs / name).model(
                x[rows], t[rows], batch.cond.index(torch.tensor(rows))
            )
            torch.testing.assert_close(found.value[rows], alone.value)
    assert found.routings[0].ids.flatten().tolist() == [0, 0, 1, 1]


def test_a_search_finds_who_is_better_where(runs):
    order, cut = find_boundaries([runs / "clean", runs / "noisy"], bins=10)
    assert cut.loss <= cut.best_alone
    assert set(order) <= {str(runs / "clean"), str(runs / "noisy")}
    with pytest.raises(ConfigError, match=r"bins: 1 .*at least the 2 runs"):
        find_boundaries([runs / "clean", runs / "noisy"], bins=1)


def test_from_the_command_line(runs, tmp_path, capsys):
    words = ["ranges", str(runs / "noisy"), str(runs / "clean"), "--boundaries", "0.5"]
    assert cli([*words, "--guidance", "3,1", "--live", "--out", str(tmp_path / "p"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["boundaries"] == [0.5]
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["model"]["ensemble"]["guidance"] == [3.0, 1.0]
    assert config["model"]["members"][0]["model"]["origin"] is None
    assert cli(["ranges", str(runs / "clean"), str(runs / "noisy"), "--search", "--json"]) == 0
    assert {"loss", "best_alone", "boundaries"} <= set(json.loads(capsys.readouterr().out))
    for wrong, text in (
        ([*words], "missing --out"),
        ([*words[:3], "--out", "x"], "either --boundaries or --search"),
        ([*words[:3], "--boundaries", "a", "--out", "x"], "expected numbers"),
        ([*words[:2], "--boundaries", "0.5", "--out", str(tmp_path / "q")], "two or more"),
        ([*words[:3], "--boundaries", "0.5,0.2", "--out", str(tmp_path / "q")], "boundaries"),
    ):
        assert cli(wrong) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_member_may_compute_in_another_precision(runs, tmp_path):
    both = [runs / "noisy", runs / "clean"]
    plain = load_run(join_ranges(both, [0.5], tmp_path / "plain")).model
    mixed = load_run(
        join_ranges(both, [0.5], tmp_path / "mixed", precision=["bfloat16", "float32"])
    ).model
    t, x = torch.tensor([0.9, 0.1]), torch.randn(2, 1, 8, 8)
    cond = Condition(label=torch.tensor([1, 2]))
    with torch.no_grad():
        ours, theirs = mixed(x, t, cond).value, plain(x, t, cond).value
    assert ours.dtype == torch.float32 and torch.equal(ours[1], theirs[1])
    assert 0 < float((ours[0] - theirs[0]).abs().max()) < 0.05
    with pytest.raises(ConfigError, match=r"precision: .*2, one per run"):
        join_ranges(both, [0.5], tmp_path / "none", precision=["bfloat16"])
    with pytest.raises(ConfigError, match="precision: 'int8' is not allowed"):
        join_ranges(both, [0.5], tmp_path / "none", precision=["int8", "float32"])
