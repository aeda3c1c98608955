"""Damaged, foreign and hostile model directories are refused by name."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from coterie.core.errors import CheckpointError
from coterie.core.folder import MANIFEST, canonical, digest, file_digest
from coterie.core.tensors import read_tensors, write_tensors
from coterie.hub import (
    load_into,
    load_manifest,
    save_pretrained,
    verify,
)
from small_experts import CONFIG, POOL, SmallModel, assert_same, save_small, scrambled


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_small(tmp_path / "model")


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


def test_F5_nan_weights_are_refused_at_load_unless_asked(tmp_path):
    model = scrambled(1)
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
    path = save_pretrained(model, tmp_path / "model", CONFIG)
    assert load_into(scrambled(2), path, check_finite=False) == []
    with pytest.raises(CheckpointError, match=r"embed\.weight holds NaN"):
        load_into(scrambled(2), path)


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
