from __future__ import annotations

import math
import os
import sys
import types
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.folder import MANIFEST
from coterie.core.tensors import read_tensors
from coterie.hub import (
    load_expert,
    load_into,
    load_pretrained,
    load_tensors,
    push_to_hub,
    save_pretrained,
    verify,
)
from small_experts import CONFIG, POOL, SmallModel, assert_same, save_small, scrambled


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_small(tmp_path / "model")


def test_round_trip_is_exact(saved):
    model, other = scrambled(1), scrambled(2)
    assert load_into(other, saved, check_finite=True) == []
    assert_same(model, other)
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids), other(ids))


def test_layout_one_file_per_expert_and_each_tensor_once(saved):
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    experts = {f"experts/layers.{i}.pool/e00{e}.safetensors" for i in range(2) for e in range(3)}
    assert files == {MANIFEST, "README.md", "trunk.safetensors", "router.safetensors", *experts}
    manifest = verify(saved)
    assert manifest.config == CONFIG
    assert manifest.model_class == "SmallModel"
    assert set(manifest.files) == files - {MANIFEST, "README.md"}
    assert set(read_tensors(saved / "trunk.safetensors")) == {"embed.weight"}
    names = set(read_tensors(saved / "router.safetensors"))
    assert {name.split(".")[-1] for name in names} >= {"selection_bias", "weight"}
    stored = load_tensors(saved)
    assert sum(value.numel() for value in stored.values()) == sum(
        {id(v): v.numel() for v in scrambled(1).state_dict(keep_vars=True).values()}.values()
    )


def test_one_expert_alone_and_lazily(saved):
    pool = scrambled(1).get_submodule(POOL)
    expected = pool.expert_state(2)
    for name in ("trunk.safetensors", "router.safetensors"):
        (saved / name).unlink()  # not needed for one expert
    found = load_expert(saved, POOL, 2)
    assert found.keys() == expected.keys()
    tensors = load_tensors(saved)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(tensors[f"{POOL}[2].{name}"], value)
    with pytest.raises(KeyError):
        tensors[f"{POOL}[2].nothing"]
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors: missing"):
        tensors["embed.weight"]
    with pytest.raises(ConfigError, match=r"index: 3 is not allowed; allowed: 0\.\.2"):
        load_expert(saved, POOL, 3)
    with pytest.raises(ConfigError, match=r"pool: 'x'"):
        load_expert(saved, "x", 0)


def test_card_says_what_it_is(saved):
    card = (saved / "README.md").read_text()
    for part in ("A toy.", "Recipe: toy", "CC0", f"| `{POOL}` | 3 |", "load_into(model", "plane"):
        assert part in card
    (saved / "README.md").write_text("edited by a person")
    verify(saved)


def test_degraded_loading_goes_on_without_one_expert(saved):
    (saved / f"experts/{POOL}/e001.safetensors").unlink()
    model = scrambled(2)
    with pytest.warns(UserWarning, match=r"layers\.0\.pool\[1\] is missing"):
        missing = load_into(model, saved, degraded=True)
    assert [(lost.pool, lost.index) for lost in missing] == [(POOL, 1)]
    reference = scrambled(1)
    for pool in (POOL, "layers.1.pool"):
        for index in range(3):
            found = model.get_submodule(pool).expert_state(index)
            for name, value in reference.get_submodule(pool).expert_state(index).items():
                lost = (pool, index) == (POOL, 1)
                assert torch.equal(found[name], torch.zeros_like(value) if lost else value)
    (saved / "trunk.safetensors").unlink()
    with pytest.raises(CheckpointError, match="trunk"):
        load_into(model, saved, degraded=True)


def test_overwriting_is_asked_for_and_spares_other_folders(saved, tmp_path):
    with pytest.raises(CheckpointError, match="a path that does not exist"):
        save_pretrained(scrambled(2), saved, CONFIG)
    save_pretrained(scrambled(2), saved, CONFIG, overwrite=True)
    other = scrambled(3)
    load_into(other, saved)
    assert_same(other, scrambled(2))
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not a model directory"):
        save_pretrained(scrambled(2), home, CONFIG, overwrite=True)
    assert (home / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]


def test_configuration_must_be_json(tmp_path):
    for config in ({"a": object()}, {"a": math.nan}):
        with pytest.raises(CheckpointError, match="config is not plain JSON"):
            save_pretrained(scrambled(1), tmp_path / "model", config)
    assert os.listdir(tmp_path) == []


def test_half_precision_models_load_into_float32(tmp_path):
    path = save_pretrained(scrambled(1).bfloat16(), tmp_path / "model", CONFIG)
    model = scrambled(2)
    load_into(model, path)
    expected = scrambled(1).bfloat16().float()
    assert_same(model, expected)


def test_dense_models_have_no_router_file(tmp_path):
    path = save_pretrained(nn.Linear(2, 2), tmp_path / "dense", {})
    assert sorted(os.listdir(path)) == ["README.md", MANIFEST, "trunk.safetensors"]
    assert "a dense model" in (path / "README.md").read_text()


@pytest.mark.parametrize("whole_run", [False, True])
def test_a_directory_says_how_to_build_its_model(tmp_path, whole_run, monkeypatch):
    import coterie.denoiser as denoiser
    from coterie.core.registry import Part, Registry

    registry = Registry("model")

    @registry.register
    class SmallConfig(Part):
        kind: Literal["small"] = "small"
        width: int = 8

        def build(self):
            return SmallModel(width=self.width)

    monkeypatch.setattr(denoiser, "MODELS", registry)
    config = {"kind": "small", "width": 4}
    config = {"recipe": "r", "model": config} if whole_run else config
    extra = {"preset": "tiny", "data": {"kind": "digits"}}
    path = save_pretrained(scrambled(1, width=4), tmp_path / "m", config, extra=extra)
    model = load_pretrained(path)
    assert_same(model, scrambled(1, width=4))
    assert not model.training
    card = (path / "README.md").read_text()
    assert 'load_pretrained("m")' in card
    assert "preset tiny" in card
    assert "Data: digits" in card


def test_a_directory_without_a_model_configuration_needs_the_model(saved):
    with pytest.raises(ConfigError, match="call load_into"):
        load_pretrained(saved)


def test_push_verifies_then_uploads(saved, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    assert push_to_hub(saved, "me/toy") == "https://hub.example/me/toy"
    assert calls == [("me/toy", str(saved))]
    (saved / "trunk.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="trunk"):
        push_to_hub(saved, "me/toy")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'coterie\[hf\]'"):
        push_to_hub(saved, "me/toy")
