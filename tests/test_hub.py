from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from coterie.core.context import Context
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.folder import MANIFEST, canonical, digest, file_digest
from coterie.core.tensors import read_tensors, write_tensors
from coterie.experts import ExpertLayerConfig
from coterie.hub import (
    load_expert,
    load_into,
    load_manifest,
    load_tensors,
    push_to_hub,
    save_pretrained,
    verify,
)

POOL = "layers.0.pool"
CONFIG = {"recipe": "toy", "model": {"width": 8}, "data": {"kind": "plane"}, "train": {}}


class SmallModel(nn.Module):
    """Two expert layers, tied embeddings, a constant table: every kind of tensor."""

    def __init__(self, num_experts: int = 3, width: int = 8) -> None:
        super().__init__()
        config = ExpertLayerConfig.from_dict(
            {"num_experts": num_experts, "router": {"selection_bias": True}}
        )
        self.embed = nn.Embedding(5, width)
        self.layers = nn.ModuleList(config.build(width) for _ in range(2))
        self.out = nn.Linear(width, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h, Context(batch=h.shape[0], tokens=h.shape[1])).y
        return self.out(h)


def scrambled(seed: int, **sizes: int) -> SmallModel:
    model = SmallModel(**sizes)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=rng))
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_pretrained(
        scrambled(1), tmp_path / "model", CONFIG, description="A toy.", data_licence="CC0"
    )


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def rewrite(folder: Path, **changes: object) -> None:
    """Forge a manifest whose own digest is right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    manifest |= changes
    (folder / MANIFEST).write_text(canonical({**manifest, "digest": digest(manifest)}))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed on purpose."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    path = folder / name
    files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    rewrite(folder, files=files)


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


@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_any_flipped_bit_is_found_by_name(saved, where):
    for path in sorted(p for p in saved.rglob("*") if p.is_file() and p.name != "README.md"):
        original = path.read_bytes()
        place = int(where * len(original))
        path.write_bytes(original[:place] + bytes([original[place] ^ 4]) + original[place + 1 :])
        with pytest.raises(CheckpointError, match=path.name):
            load_into(scrambled(2), saved)
        path.write_bytes(original)
    assert load_into(scrambled(2), saved) == []


def test_truncated_deleted_swapped_and_empty_files(saved):
    trunk, first, second = (
        saved / "trunk.safetensors",
        saved / f"experts/{POOL}/e000.safetensors",
        saved / f"experts/{POOL}/e001.safetensors",
    )
    for path in (trunk, first):
        original = path.read_bytes()
        for broken in (original[:-1], original[:7], b"", None):
            path.unlink() if broken is None else path.write_bytes(broken)
            with pytest.raises(CheckpointError, match=path.name):
                load_into(scrambled(2), saved)
            path.write_bytes(original)
    held = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(held)
    with pytest.raises(CheckpointError, match=r"e000\.safetensors: damaged, its SHA-256"):
        load_into(scrambled(2), saved)


def test_a_refused_directory_leaves_the_model_alone(saved):
    (saved / "experts/layers.1.pool/e002.safetensors").write_bytes(b"x")
    model = scrambled(2)
    with pytest.raises(CheckpointError, match=r"layers\.1\.pool/e002"):
        load_into(model, saved)
    assert_same(model, scrambled(2))


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


def test_foreign_models_are_refused(saved, tmp_path):
    with pytest.raises(
        CheckpointError, match="model: 'Linear' is not allowed; allowed: SmallModel"
    ):
        load_into(nn.Linear(2, 2), saved)
    with pytest.raises(CheckpointError, match="pools of experts"):
        load_into(scrambled(2, num_experts=4), saved)
    with pytest.raises(CheckpointError, match=r"embed\.weight is .*\[5, 8\], expected .*\[5, 6\]"):
        load_into(scrambled(2, width=6), saved)
    with pytest.raises(CheckpointError, match="to_empty"):
        load_into(SmallModel().to("meta"), saved)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        load_manifest(tmp_path / "nothing")


def test_unknown_and_missing_tensors_are_named(saved):
    path = saved / "trunk.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, {**tensors, "../../evil": torch.zeros(1)})
    rehash(saved, path.name)
    with pytest.raises(CheckpointError, match=r"unknown tensors \.\./\.\./evil"):
        load_into(scrambled(2), saved)
    write_tensors(path, {"other": torch.zeros(1)})
    rehash(saved, path.name)
    with pytest.raises(CheckpointError, match=r"missing tensors embed\.weight"):
        load_into(scrambled(2), saved)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a\0b", "experts/../../evil", "..\\evil", ""]
)
def test_file_names_that_lead_out_are_refused(saved, name):
    files = json.loads((saved / MANIFEST).read_text())["files"]
    rewrite(saved, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match=r"file name .* is not allowed"):
        load_manifest(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "coterie.checkpoint"}, "format: 'coterie.checkpoint' is not allowed"),
        ({"version": 2}, "version: 2 is not allowed; allowed: 1"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"trunk.safetensors": 3}}, "files must map"),
        ({"pools": {"p": ["../x"]}}, "not among its files"),
        ({"pools": {"p": "text"}}, "pools"),
        ({"pools": {"p": ["trunk.safetensors"], "q": ["trunk.safetensors"]}}, "two experts"),
    ],
)
def test_forged_manifests_are_refused(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_manifest(saved)


def test_hostile_manifest_text_is_refused_quickly(saved):
    for text in ("[" * 200_000, '{"a": NaN}', "\udcff", "null", "{}", '{"format": 1e999}'):
        (saved / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            load_manifest(saved)


def test_links_are_refused(saved, tmp_path):
    outside = tmp_path / "outside.safetensors"
    trunk = saved / "trunk.safetensors"
    shutil.move(trunk, outside)
    trunk.symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link"):
        load_into(scrambled(2), saved)
    trunk.unlink()
    shutil.move(outside, trunk)
    shutil.move(saved / "experts", tmp_path / "experts")
    (saved / "experts").symlink_to(tmp_path / "experts")
    with pytest.raises(CheckpointError, match="a link"):
        load_into(scrambled(2), saved)


def test_hostile_safetensors_are_refused(saved):
    path = saved / "trunk.safetensors"
    header = json.dumps(
        {"embed.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
    ).encode()
    for data in (
        (2**60).to_bytes(8, "little") + b"{}",
        len(header).to_bytes(8, "little") + header + b"\0\0\0\0",
        b"\x80\x04cos\nsystem\n",
    ):
        path.write_bytes(data)
        rehash(saved, path.name)
        with pytest.raises(CheckpointError, match=r"trunk\.safetensors: not a valid safetensors"):
            load_into(scrambled(2), saved)


def test_nan_weights_are_refused_when_asked(tmp_path):
    model = scrambled(1)
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
    path = save_pretrained(model, tmp_path / "model", CONFIG)
    assert load_into(scrambled(2), path) == []
    with pytest.raises(CheckpointError, match=r"embed\.weight holds NaN"):
        load_into(scrambled(2), path, check_finite=True)


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


def test_full_disk_leaves_the_old_directory(saved):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save_pretrained(scrambled(2), saved, CONFIG, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    verify(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


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
