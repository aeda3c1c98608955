from __future__ import annotations

import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

import coterie.core.tensors as tensors_io
from coterie.core.errors import CheckpointError
from coterie.train import CheckpointWarning, checkpoint

STATE = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "flag": torch.tensor([True, False])},
    "optimizer": {"step/w": torch.tensor(3.0), "exp_avg/w": torch.ones(2, 3)},
}


def save(run: Path, step: int, **options) -> Path:
    return checkpoint.save(run, STATE, {"samples_seen": step * 8}, step=step, **options)


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 120, config_hash="abc")
    assert path.name == "step-00000120"
    found = checkpoint.load(path)
    assert (found.step, found.config_hash) == (120, "abc")
    assert found.scalars == {"samples_seen": 960}
    for group, tensors in STATE.items():
        assert found.state[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found.state[group][name], value)
            assert found.state[group][name].dtype == value.dtype


def test_tensors_that_share_memory_or_are_views_survive(tmp_path):
    base = torch.arange(12.0)
    state = {"model": {"a": base[:6], "b": base.view(3, 4).t(), "c": base, "none": torch.empty(0)}}
    path = checkpoint.save(tmp_path, state, {}, step=1)
    for name, value in state["model"].items():
        assert torch.equal(checkpoint.load(path).state["model"][name], value)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None


def test_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [4, 5]


def test_pruning_spares_the_fallback_of_a_damaged_newer_one(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000030/model.safetensors").write_bytes(b"bad")
    save(tmp_path, 25, keep=2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20, 25, 30]
    with pytest.warns(CheckpointWarning, match=r"step-00000030/model\.safetensors"):
        assert checkpoint.latest(tmp_path).name == "step-00000025"
    save(tmp_path, 30)  # training reaches it again and replaces it
    assert checkpoint.latest(tmp_path).name == "step-00000030"


def test_a_failing_purge_does_not_lose_the_new_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path):
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr(checkpoint, "remove", refuse)
    with pytest.warns(CheckpointWarning, match="could not be removed"):
        save(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000002"


def damages(path: Path, rng: random.Random):
    """Every way to break one file of a checkpoint, as (what, action)."""
    data = path.read_bytes()
    for _ in range(12):
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", lambda flipped=flipped: path.write_bytes(flipped)
    for size in (0, 1, 8, len(data) // 2, len(data) - 1):
        yield f"cut to {size}", lambda size=size: path.write_bytes(data[:size])
    yield "grown", lambda: path.write_bytes(data + b"\0")
    yield "deleted", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())


def test_every_damage_is_named_and_the_earlier_checkpoint_used(tmp_path):
    good = save(tmp_path, 10)
    bad = save(tmp_path, 20)
    rng = random.Random(0)
    pristine = tmp_path / "pristine"
    shutil.copytree(bad, pristine)
    for name in [path.name for path in files_of(bad)]:
        for what, damage in damages(bad / name, rng):
            damage()
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                checkpoint.load(bad)
            with pytest.warns(CheckpointWarning, match=f"step-00000020/{name}"):
                assert checkpoint.latest(tmp_path) == good, what
            shutil.rmtree(bad)
            shutil.copytree(pristine, bad)
    assert checkpoint.latest(tmp_path) == bad


def test_swapped_added_and_linked_files_are_refused(tmp_path):
    path = save(tmp_path, 10)
    model, optimizer = path / "model.safetensors", path / "optimizer.safetensors"
    first, second = model.read_bytes(), optimizer.read_bytes()
    model.write_bytes(second)
    optimizer.write_bytes(first)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        checkpoint.load(path)
    model.write_bytes(first)
    optimizer.write_bytes(second)
    (path / "stray.bin").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"stray\.bin: not listed"):
        checkpoint.load(path)
    (path / "stray.bin").unlink()
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link"):
        checkpoint.load(path)


def test_a_manifest_of_another_checkpoint_does_not_fit(tmp_path):
    first = save(tmp_path, 1)
    state = {"model": {"w": torch.zeros(2, 3)}}
    second = checkpoint.save(tmp_path, state, {}, step=2)
    shutil.copy(second / "manifest.json", first / "manifest.json")
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(first)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").unlink()
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*00000002.*00000001"),
    ):
        checkpoint.latest(tmp_path)


def test_another_configuration_is_refused_with_both_hashes(tmp_path):
    save(tmp_path, 1, config_hash="aaaa")
    assert checkpoint.latest(tmp_path, "aaaa") is not None
    with pytest.raises(CheckpointError, match=r"configuration aaaa, this run is bbbb"):
        checkpoint.latest(tmp_path, "bbbb")


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002: could not be written"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    checkpoint.load(checkpoint.latest(tmp_path))


@pytest.mark.parametrize("fail_at", range(3))
@pytest.mark.parametrize("number", [28, 30])  # no space left; read-only file system
def test_a_disk_failing_at_any_file(tmp_path, monkeypatch, fail_at, number):
    save(tmp_path, 1)
    real, seen = tensors_io.write_tensors, []

    def write(path, tensors):
        if len(seen) == fail_at:
            raise OSError(number, os.strerror(number))
        seen.append(path)
        real(path, tensors)

    monkeypatch.setattr(tensors_io, "write_tensors", write)
    state = {**STATE, "third": {"x": torch.zeros(1)}}
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        checkpoint.save(tmp_path, state, {}, step=2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_writing_is_not_visible_before_it_is_complete(tmp_path, monkeypatch):
    real = tensors_io.write_tensors

    def write(path, tensors):
        assert checkpoint.steps(tmp_path) == []
        real(path, tensors)

    monkeypatch.setattr(tensors_io, "write_tensors", write)
    save(tmp_path, 1)
    assert len(checkpoint.steps(tmp_path)) == 1
