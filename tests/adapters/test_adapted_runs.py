"""Runs that train adapters: the base stays, is not copied, and several adapters add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.adapters import (
    AdapterConfig,
    BasisConfig,
    LoraConfig,
    adapters_of,
    base_digest,
    read_adapter,
    save_adapter,
    weights_of,
)
from coterie.cli.main import run as coterie
from coterie.core.config import override
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.tensors import read_tensors
from coterie.hub import load_manifest, load_pretrained
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.measure.report import report_run
from coterie.runs.origins.first_weights import InitConfig
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import load_run
from coterie.runs.training import prepare, start
from coterie.train import checkpoint
from small_models import images, small, times

SHORT: dict[str, Any] = {
    "train.steps": 4,
    "train.batch": 8,
    "train.warmup": 0,
    "train.lr": 0.01,
    "train.log_every": 2,
    "train.checkpoint_every": 2,
    "train.threads": 1,
    "sample.steps": 2,
}
TARGETS = ("backbone.trunk.*.qkv", "backbone.trunk.*.out", "backbone.trunk.*.up")


def short_run(name: str, out: Path) -> Path:
    return start(override(small(name), SHORT), out, progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run("dit", tmp_path_factory.mktemp("base") / "base")


def lora(index: int = 0, **changes: Any) -> LoraConfig:
    fields = {
        "targets": TARGETS[:2],
        "rank": 2,
        "basis": BasisConfig(index=index),
        "embeddings": ("backbone.label.table",),
        "rows": (index,),
    }
    return LoraConfig.from_dict({**fields, **changes})


def adapted(base: Path, *adapters: AdapterConfig, **train: Any) -> RunConfig:
    config = RunConfig.load(base / "config.json")
    init = InitConfig(path=str(base), adapters=adapters)
    return config.replace(init=init, train=config.train.replace(**train))


def concept(base: Path, out: Path, index: int, **changes: Any) -> Path:
    new = AdapterConfig(name="own", lora=lora(index, **changes))
    return start(adapted(base, new), out, progress=False)


def answer(model: Any) -> torch.Tensor:
    batch = images(4, labels=[0, 1, 2, 3])
    with torch.no_grad():
        value: torch.Tensor = model(batch.x, times(4), batch.cond).value
    return value


def weights(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    latest = checkpoint.latest(path)
    assert latest is not None
    return checkpoint.load(latest).state


@pytest.mark.parametrize("name", ["dit", "dit-moe"])
def test_only_adapters_are_trained_and_saved(name: str, tmp_path: Path) -> None:
    base = short_run(name, tmp_path / "base")
    first = prepare(adapted(base, AdapterConfig(name="own", lora=lora())), tmp_path / "run")
    plain = load_run(base).model
    assert torch.equal(answer(load_run(first).model), answer(plain))
    before = base_digest(load_run(first).model)
    run = concept(base, tmp_path / "run", 0)
    model = load_run(run).model
    assert base_digest(model) == before == base_digest(plain)
    assert not torch.allclose(answer(model), answer(plain))
    ends = ("own.up", "own.change")
    for group, tensors in weights(run).items():
        assert tensors and all(name.endswith(ends) for name in tensors), group
    stored = read_tensors(run / "model" / "trunk.safetensors")
    assert all(name.endswith(ends) for name in stored)
    assert {path.name for path in (run / "model").iterdir()} == {
        "README.md",
        "manifest.json",
        "trunk.safetensors",
    }


def test_the_model_directory_finds_its_base_or_says_so(base: Path, tmp_path: Path) -> None:
    run = concept(base, tmp_path / "run", 0)
    expected = answer(load_run(run).model)
    assert torch.equal(answer(load_pretrained(run / "model")), expected)
    assert load_manifest(run / "model").parameters["total"] > 1000
    moved = (tmp_path / "run" / "model").rename(tmp_path / "model")
    manifest = json.loads((moved / "manifest.json").read_text())
    assert manifest["extra"]["base"]["path"] == str(base)
    assert torch.equal(answer(load_pretrained(moved, base=base)), expected)
    with pytest.raises(CheckpointError, match=r"base: .*say where their base lies"):
        load_pretrained(moved, base=tmp_path / "nowhere")
    other = start(RunConfig.load(base / "config.json").replace(seed=5), tmp_path / "o", False)
    with pytest.raises(CheckpointError, match=r"base: '\w+' .*its adapters were trained on"):
        load_pretrained(moved, base=other)


def test_training_resumes_where_it_stopped(base: Path, tmp_path: Path) -> None:
    config = adapted(base, AdapterConfig(name="own", lora=lora()))
    whole = start(config, tmp_path / "whole", progress=False)
    prepare(config, tmp_path / "parts")
    again = start(config, tmp_path / "parts", progress=False)
    first, second = weights(whole), weights(again)
    for group, tensors in first.items():
        assert all(torch.equal(value, second[group][name]) for name, value in tensors.items())


def test_adapters_of_several_runs_add_up(base: Path, tmp_path: Path) -> None:
    runs = [concept(base, tmp_path / f"c{index}", index) for index in range(2)]
    chosen = [AdapterConfig(name=f"c{i}", path=str(run)) for i, run in enumerate(runs)]
    merged = start(adapted(base, *chosen, steps=0), tmp_path / "merged", progress=False)
    assert {path.name for path in merged.iterdir()} == {"config.json"}
    model = load_run(merged).model
    assert list(adapters_of(model)) == ["c0", "c1"]
    for index, run in enumerate(runs):
        alone = adapters_of(load_run(run).model)["own"]
        for path, part in adapters_of(model)[f"c{index}"].items():
            for name, value in part.state_dict().items():
                assert torch.equal(value, alone[path].state_dict()[name])
    off = [chosen[0], chosen[1].replace(weight=0.0)]
    one = start(adapted(base, *off, steps=0), tmp_path / "one", progress=False)
    assert torch.equal(answer(load_run(one).model), answer(load_run(runs[0]).model))
    onward = RunConfig.load(base / "config.json").replace(init=InitConfig(path=str(merged)))
    plain = load_run(prepare(onward, tmp_path / "onward")).model
    torch.testing.assert_close(answer(plain), answer(model), rtol=1e-5, atol=1e-6)
    assert not adapters_of(plain)


def test_an_adapted_run_is_sampled_and_reported_like_any_other(base: Path, tmp_path: Path) -> None:
    run = concept(base, tmp_path / "run", 0)
    config = adapted(base, AdapterConfig(name="a", path=str(run)), steps=0)
    merged = start(config, tmp_path / "merged", progress=False)
    assert sample_run(load_run(run), 4).is_file() and sample_run(load_run(merged), 4).is_file()
    assert report_run(merged, progress=False).is_file()


def test_peft_folders_are_adapters_too(base: Path, tmp_path: Path) -> None:
    run = concept(base, tmp_path / "run", 1)
    save_adapter(load_run(run).model, "own", tmp_path / "folder", base=str(base))
    config = adapted(base, AdapterConfig(name="a", path=str(tmp_path / "folder")), steps=0)
    again = load_run(start(config, tmp_path / "again", progress=False)).model
    torch.testing.assert_close(answer(again), answer(load_run(run).model), rtol=1e-5, atol=1e-6)


def test_cost_is_known_before_any_work(base: Path) -> None:
    config = adapted(base, AdapterConfig(name="own", lora=lora()))
    plain = plan(config.replace(init=None), measure=False)["parameters_total"]
    outputs = 2 * (3 * 64 + 64)  # qkv and out of two blocks
    assert plan(config, measure=False)["parameters_total"] == plain + 2 * outputs + 64
    assert plan(config)["projected_minutes"] >= 0


def bad(base: Path, tmp: Path, what: str) -> RunConfig:
    run = tmp / "run"
    new = AdapterConfig(name="own", lora=lora())
    if what == "slots":
        return adapted(base, new, AdapterConfig(name="b", lora=lora(0)))
    if what == "basis":
        other = lora(1, basis=BasisConfig(seed=3, index=1))
        return adapted(base, new, AdapterConfig(name="b", lora=other))
    if what == "rank":
        return adapted(base, AdapterConfig(name="own", lora=lora(rank=65, basis=None)))
    if what == "capacity":
        return adapted(base, AdapterConfig(name="own", lora=lora(32, rows=(0,))))
    if what == "nothing there":
        return adapted(base, AdapterConfig(name="a", path=str(tmp / "none")), steps=0)
    if what == "no adapter":
        return adapted(base, AdapterConfig(name="a", path=str(base)), steps=0)
    concept(base, run, 0)
    if what == "other base":
        config = RunConfig.load(base / "config.json").replace(seed=9)
        other_base = start(config, tmp / "other", progress=False)
        return adapted(other_base, AdapterConfig(name="a", path=str(run)), steps=0)
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("slots", r"b\.basis\.index: 0"),
        ("basis", r"b\.basis: .*one basis"),
        ("rank", r"rank: 65 .*allowed: 1\.\.64"),
        ("capacity", r"basis\.index: 32 .*allowed: 0\.\.31"),
        ("nothing there", r"a: path: .*a run directory, or a folder"),
        ("no adapter", r"a: path: .*it trains: none"),
        ("other base", r"run: base: .*its adapter was trained on"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, what: str, message: str
) -> None:
    config = bad(base, tmp_path, what)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        start(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_steps_say_whether_there_is_something_to_train(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: 0"):
        adapted(base, AdapterConfig(name="own", lora=lora()), steps=0)
    with pytest.raises(ConfigError, match=r"train\.steps: 4"):
        adapted(base, AdapterConfig(name="own", path="somewhere"))
    with pytest.raises(ConfigError, match=r"path: None"):
        AdapterConfig.from_dict({"name": "own"})
    with pytest.raises(ConfigError, match="names that all differ"):
        new = AdapterConfig(name="own", lora=lora()).model_dump()
        InitConfig.from_dict({"path": str(base), "adapters": (new, new)})


def test_the_verbs_check_merge_and_export(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [concept(base, tmp_path / name, i) for i, name in enumerate(("six", "seven.5"))]
    names = [str(run) for run in runs]
    capsys.readouterr()
    assert coterie(["adapter", "check", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["adapter"] for row in found["adapters"]] == ["six", "seven-5"]
    assert [row["slot"] for row in found["adapters"]] == [0, 1]
    assert {row["slots"] for row in found["adapters"]} == {32}
    for row in found["adapters"]:
        assert 0 < row["share_of_parameters"] < 1
    assert found["pairs"][0]["update_overlap"] < 1e-5
    assert found["measures"]["crosstalk"] > 0 and found["measures"]["adapter_drift"] > 0
    assert coterie(["adapter", "check", *names]) == 0
    told = capsys.readouterr().out
    assert "update_overlap" in told and "share_of_parameters" in told
    out = tmp_path / "both"
    assert coterie(["adapter", "merge", *names, "--out", str(out), "-n"]) == 0
    assert not out.exists()
    weights = ["--weight", "1", "--weight", "0.5"]
    assert coterie(["adapter", "merge", *names, "--out", str(out), *weights]) == 0
    assert weights_of(load_run(out).model) == {"six": 1.0, "seven-5": 0.5}
    assert coterie(["adapter", "export", names[0], "--out", str(tmp_path / "peft")]) == 0
    assert read_adapter(tmp_path / "peft").config.rows == (0,)
    capsys.readouterr()
    assert coterie(["adapter", "merge", str(base), "--out", str(tmp_path / "x")]) == 2
    assert "a run that trains an adapter" in capsys.readouterr().err
    assert coterie(["adapter", "export", str(out), "--out", str(tmp_path / "x")]) == 2
    assert "six, seven-5" in capsys.readouterr().err


def test_B5_a_run_trains_adapters_of_experts(tmp_path: Path) -> None:
    """On a mixture of experts: saved alone, loaded, exported and put on the base again."""
    base = short_run("dit-moe", tmp_path / "base")
    experts = LoraConfig(targets=("*.routers.*",), experts=("*",), rank=2)
    config = adapted(base, AdapterConfig(name="own", lora=experts))
    run = start(config, tmp_path / "run", progress=False)
    moved = load_run(run)
    parts = adapters_of(moved.model)["own"]
    names = {name for part in parts.values() for name, _ in part.named_parameters()}
    assert {"down.gate_up", "up.down", "down", "up"} <= names
    for path, part in parts.items():
        assert all(bool(p.any()) for p in part.parameters()), path  # every factor has learnt
    assert all(".adapters." in name for name in weights(run)["model"])
    assert not torch.allclose(answer(moved.model), answer(load_run(base).model), atol=1e-3)
    torch.testing.assert_close(answer(load_pretrained(run / "model")), answer(moved.model))
    save_adapter(moved.model, "own", tmp_path / "folder")
    read = adapted(base, AdapterConfig(name="own", path=str(tmp_path / "folder")), steps=0)
    again = load_run(start(read, tmp_path / "again"))
    torch.testing.assert_close(answer(again.model), answer(moved.model))
