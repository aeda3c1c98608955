"""Aggregators under the usual verbs: trained on top of runs that stay where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.cli.main import run
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.prediction import Condition
from coterie.core.tensors import read_tensors
from coterie.denoiser import DenoiserConfig
from coterie.hub import load_manifest, load_pretrained
from coterie.inspect import ReportData, Trace, write_report
from coterie.runs.config import RunConfig
from coterie.runs.measure.gate_maps import gate_maps
from coterie.runs.origins.trained_model import WeightAverageConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

TRUNK = TrunkConfig(width=16, depth=1, heads=2)
MODEL = DenoiserConfig(backbone=DiTConfig(image_size=8, patch=4, trunk=TRUNK))
LABELS = Condition(label=torch.tensor([1, -1]))
SIZES = ["--width", "8", "--layers", "1", "--heads", "2", "--groups", "4"]


def trained(folder: Path, seed: int, steps: int = 3) -> Path:
    config = RunConfig.from_dict(
        {
            "seed": seed,
            "data": {"kind": "covered", "keep": "left" if seed else "right"},
            "model": MODEL.model_dump(mode="json"),
            "train": {"steps": steps, "batch": 8, "lr": 0.01, "threads": 1},
            "sample": {"steps": 2},
        }
    )
    return start(config, folder, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    return [trained(folder / name, seed) for seed, name in enumerate(("first", "second"))]


def words(runs: list[Path], out: Path, *more: str) -> list[str]:
    return ["aggregate", *map(str, runs), "--out", str(out), "-q", *SIZES, *more]


@pytest.fixture(scope="module")
def fused(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "both"
    assert run(words(runs, out, "--train.steps=3")) == 0
    return out


def test_a_run_saves_its_aggregators_and_reads_the_rest(runs: list[Path], fused: Path) -> None:
    config = RunConfig.load(fused / "config.json")
    assert config.data.kind == "digits"  # all of the data, not the part of the first expert
    files = sorted((fused / "checkpoints").rglob("model.safetensors"))
    assert files and all(
        name.startswith("aggregators.") for file in files for name in read_tensors(file)
    )
    loaded = load_run(fused)
    assert [type(part).__name__ for part in loaded.model.aggregators] == ["SpatialAggregator"] * 3
    moved = [p.abs().sum() > 0 for n, p in loaded.model.named_parameters() if "conv_out" in n]
    assert moved and all(moved)
    for path, network in zip(runs, loaded.model.networks, strict=True):
        own = load_run(path).model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())


def test_the_same_command_again_goes_on_to_the_bit(
    runs: list[Path], fused: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert run(words(runs, out, "--train.steps=3", "--train.checkpoint_every=2")) == 0
    for path in (fused, out):
        assert run(["train", str(path), "-q"]) == 0
    first, second = (load_run(path).model.state_dict() for path in (fused, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_directory_needs_no_runs(runs: list[Path], fused: Path) -> None:
    manifest = load_manifest(fused / "model")
    assert len(manifest.members) == 2 and "runs" not in json.dumps(manifest.config)
    assert str(runs[0]) not in json.dumps(manifest.config)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        expected = load_run(fused).model(x, t, LABELS).value
        assert torch.equal(load_pretrained(fused / "model")(x, t, LABELS).value, expected)


def test_the_report_shows_who_decides_where(fused: Path, tmp_path: Path) -> None:
    loaded = load_run(fused)
    maps = gate_maps(loaded)
    assert maps is not None and maps.experts == ("first", "second")
    assert list(maps.weights) == ["patch_in", "block.0", "head"]
    for weights in maps.weights.values():
        assert weights.shape == (len(maps.inputs), 2, 2, 2)
        assert np.allclose(weights.sum(1), 1.0)
    trace = Trace()
    trace.add(loaded.model(torch.zeros(2, 1, 8, 8), torch.rand(2), LABELS).routings)
    page = write_report(tmp_path, ReportData("both", trace=trace, gate_maps=maps))
    for name in ("gate_maps", "expert_by_position", "expert_by_noise"):
        assert (tmp_path / f"{name}.png").is_file()
    assert "Who decides where" in page.read_text(encoding="utf-8")


def test_a_single_network_has_no_such_maps(runs: list[Path]) -> None:
    assert gate_maps(load_run(runs[0])) is None


def test_members_that_changed_or_went_are_refused(tmp_path: Path) -> None:
    experts = [trained(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "both"
    assert run(words(experts, out, "--train.steps=1")) == 0
    shutil.rmtree(experts[0])
    with pytest.raises(ConfigError, match=r"members\.a: .*nothing at"):
        load_run(out)
    trained(experts[0], seed=5)
    with pytest.raises(CheckpointError, match="holds other weights"):
        load_run(out)


def test_headroom_is_said_before_anything_is_trained(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(path) for path in runs]
    assert run(["aggregate", *names, "--headroom", "--samples", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["gains"]) == {"oracle", "predictable", "per_sample"}
    assert found["threshold"] == 0.02 and found["go"] in (True, False)
    assert found["gains"]["oracle"] >= found["gains"]["predictable"]
    assert run(["aggregate", *names, "--headroom", "--samples", "16"]) == 0
    assert "verdict" in capsys.readouterr().out


def test_bad_commands_are_refused(runs: list[Path], tmp_path: Path) -> None:
    names = [str(path) for path in runs]
    assert run(["aggregate"]) == 2
    assert run(["aggregate", *names]) == 2  # no --out
    assert run(["aggregate", names[0], "--headroom"]) == 2
    assert run(words([tmp_path / "nothing"], tmp_path / "out")) == 2
    assert run(words(runs, tmp_path / "out", "--points", "mid")) == 2
    assert not (tmp_path / "out").exists()


def test_an_average_of_weights_is_their_mean(runs: list[Path]) -> None:
    paths = tuple(str(path) for path in runs)
    first, second = (load_run(path).model.state_dict() for path in runs)
    mean = WeightAverageConfig(paths=paths).build()
    tilted = WeightAverageConfig(paths=paths, shares=(0.25, 0.75)).build()
    for name, value in mean.state_dict().items():
        assert torch.allclose(value, (first[name] + second[name]) / 2, atol=1e-7)
        other = tilted.state_dict()[name]
        assert torch.allclose(other, 0.25 * first[name] + 0.75 * second[name], atol=1e-7)
    assert not any(p.requires_grad for p in mean.parameters())


def test_an_average_of_other_models_is_refused(runs: list[Path], tmp_path: Path) -> None:
    wide = MODEL.replace(backbone=MODEL.backbone.replace(trunk=TRUNK.replace(width=32)))
    config = RunConfig.load(runs[0] / "config.json")
    other = start(config.replace(model=wide), tmp_path / "wide", progress=False)
    with pytest.raises(ConfigError, match=r"paths: .*models of one configuration"):
        WeightAverageConfig(paths=(str(runs[0]), str(other))).build()
    with pytest.raises(ConfigError, match="shares"):
        WeightAverageConfig.from_dict({"paths": ["a", "b"], "shares": [1.0]})
