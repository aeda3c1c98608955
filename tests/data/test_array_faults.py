"""Arrays of others: what a file claims is checked before it is read; answers are 0, 1, unknown."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.cli.main import run
from coterie.core.config import override
from coterie.core.errors import ConfigError, DataError
from coterie.data import arrays, build_source
from coterie.data.arrays import open_npy, read_npz
from coterie.data.ratings.rating_rows import Feature, RatingSource
from coterie.runs.build import build_source as run_source
from coterie.train.objectives.multitask import MultiTaskObjective, MultiTaskObjectiveConfig
from small_models import small

GOOD = np.random.default_rng(0).normal(size=(30, 4, 4, 4)).astype(np.float32)


def latents(folder: Path, values: Any = GOOD, labels: Any = None) -> Any:
    np.save(folder / "latents.npy", values)
    np.save(folder / "labels.npy", np.zeros(len(values), int) if labels is None else labels)
    return build_source({"kind": "latents", "path": str(folder)})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (GOOD + 1j, "complex"),
        ((GOOD * 40 + 128).astype(np.uint8), "'uint8 of shape .*floating point"),
        (GOOD.astype(np.int64), "int64"),
        (GOOD > 0, "bool"),
        (GOOD[0], "with 4 dimensions"),
        (GOOD[:0], "at least one of them"),
        (np.array([{}] * 30, dtype=object), "Python objects"),
    ],
)
def test_A9_what_is_no_latent_is_refused(tmp_path: Path, values: Any, told: str) -> None:
    with pytest.raises(DataError, match=rf"latents\.npy: .*{told}"):
        latents(tmp_path, values)


@pytest.mark.parametrize("kind", [">f4", ">f2", "<f8", "<f2"])
def test_A9_other_byte_orders_and_precisions_are_read(tmp_path: Path, kind: str) -> None:
    found = latents(tmp_path, GOOD.astype(kind)).get([0, 1, 2]).x
    wanted = latents(tmp_path, GOOD.astype(kind).astype(np.float32)).get([0, 1, 2]).x
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_A9_labels_are_whole_numbers_one_per_latent(tmp_path: Path) -> None:
    for wrong in (np.zeros(30), np.zeros((30, 1), int), np.zeros(29, int)):
        with pytest.raises(DataError, match=r"labels"):
            latents(tmp_path, labels=wrong)
    with pytest.raises(DataError, match="class id of sample"):
        latents(tmp_path, labels=np.full(30, 2**63, np.uint64))


@pytest.mark.parametrize("kind", ["latents", "cloud-folder"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("archive", r"not a plain array \(an \.npz archive\)"),
        (b"", r"not a plain array \(0 bytes\)"),
        ("short", "bytes of numbers"),
        ("long", "bytes of numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff", "not a readable array file"),
        (b"\x93NUMPY\x09\x00\x00\x00", r"version of the format: \(9, 0\)"),
        ("pipe", "a named pipe"),
    ],
)
def test_A9_what_is_no_array_is_refused(tmp_path: Path, kind: str, content: Any, told: str) -> None:
    name = "latents.npy" if kind == "latents" else "ball/x.npy"
    (tmp_path / "ball").mkdir()
    path = tmp_path / name
    np.save(tmp_path / "labels.npy", np.zeros(30, int))
    np.save(path, GOOD)
    if content == "archive":
        with path.open("wb") as file:
            np.savez(file, GOOD)
    elif content in ("short", "long"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-5] if content == "short" else whole + b"12345")
    elif content == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told if content != "pipe" else rf"{told}|class folders"):
        build_source({"kind": kind, "path": str(tmp_path)}).get([0])


def test_H_an_empty_array_file_is_no_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(30, int))
    (tmp_path / "latents.npy").touch()
    data = json.dumps({"kind": "latents", "path": str(tmp_path)})
    code = run(["train", "dit-moe", f"--data={data}", "--out", str(tmp_path / "run")])
    assert code == 2 and "0 bytes" in capsys.readouterr().err


def test_A9_a_header_that_promises_more_allocates_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", GOOD)
    content = (tmp_path / "x.npy").read_bytes().replace(b"(30, ", b"(9999999999, ")
    head = content.index(b"\n")
    (tmp_path / "x.npy").write_bytes(content[: head - 9] + content[head:])
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.npy: .*bytes of numbers|readable"):
        open_npy(tmp_path / "x.npy")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def episodes(path: Path, **changes: Any) -> Any:
    given = {
        "observations": np.zeros((20, 3), np.float32),
        "actions": np.zeros((20, 2), np.float32),
        "lengths": np.full(5, 4),
        "goals": np.arange(5) % 2,
    }
    np.savez_compressed(path, **{**given, **changes})
    return build_source({"kind": "demonstrations", "path": str(path)})


def test_G10_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arrays.MAX_UNPACKED == 256 * 2**20
    monkeypatch.setattr(arrays, "MAX_UNPACKED", 4 * 2**20)
    path, size = tmp_path / "bomb.npz", 8 * 2**20
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (size // 4, 1)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("actions.npy", buffer.getvalue() + bytes(size))
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpacked size: .*allowed: 4,194,304 or fewer"):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_H_huge_numbers_in_files_make_nothing_huge(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    assert len(episodes(path)) == 16
    with pytest.raises(DataError, match=rf"goals: {2**62} .*999999 or less"):
        episodes(path, goals=np.full(5, 2**62))
    with pytest.raises(DataError, match=r"lengths: \d+ .*20 or less"):
        episodes(path, lengths=np.array([4, 4, 4, 4, 2**63], np.uint64))
    with pytest.raises(DataError, match="moments"):
        episodes(path, lengths=np.array([4, 4, 4, -(2**60), 2]))


def test_A9_arrays_of_an_archive_are_what_numpy_reads(tmp_path: Path) -> None:
    given = {"a": GOOD.astype(">f2"), "b": np.asfortranarray(GOOD[0, 0]), "c": np.array(3)}
    np.savez_compressed(tmp_path / "x.npz", **given)
    found = read_npz(tmp_path / "x.npz")
    assert set(found) == {"a", "b", "c"}
    for name, values in given.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("wrong", [-1.0, 2.0, 0.5, np.inf])
def test_A10_answers_other_than_yes_no_or_unknown_are_refused(wrong: float) -> None:
    answers = np.array([[0, 1], [np.nan, 1], [1, wrong]], np.float32)

    def source(targets: np.ndarray) -> RatingSource:
        fields = [Feature("user", 3)]
        users = np.arange(3)
        return RatingSource(
            "mine", fields, users[:, None], targets, ("like", "buy"), users, licence="-"
        )

    told = r"answer of sample 2 to task 'buy': .* is not allowed; allowed: 0, 1, or NaN"
    with pytest.raises(DataError, match=rf"mine: {told}"):
        source(answers)
    assert source(np.where(answers == wrong, np.nan, answers)).get([1]).targets.isnan().any()
    objective = MultiTaskObjective(MultiTaskObjectiveConfig(), ("like", "buy"))
    with pytest.raises(DataError, match=rf"targets: {told}"):
        objective.errors(torch.zeros(3, 2), torch.from_numpy(answers))


def test_A10_unknown_answers_count_nothing() -> None:
    objective = MultiTaskObjective(MultiTaskObjectiveConfig(), ("like", "buy"))
    answers = torch.tensor([[0.0, torch.nan], [1.0, torch.nan]])
    errors, known = objective.errors(torch.tensor([[5.0, 9.0], [5.0, -9.0]]), answers)
    assert known.tolist() == [[True, False], [True, False]]
    assert errors[:, 1].tolist() == [0, 0] and bool((errors[:, 0] > 0).all())


def test_A9_floats_that_torch_does_not_have_are_refused_at_the_door(tmp_path: Path) -> None:
    values = GOOD.astype(np.longdouble)
    with pytest.raises(DataError, match=r"latents\.npy: .*of 16, 32 or 64 bits"):
        latents(tmp_path, values)
    with pytest.raises(DataError, match=r"labels\.npy: .*integers"):
        latents(tmp_path, labels=np.zeros(30, np.longdouble))
    with pytest.raises(DataError, match=r"^actions: .*of 16, 32 or 64 bits"):
        arrays.check_numbers(values, "actions")
    assert arrays.check_numbers(GOOD.astype(np.float16), "actions").dtype == np.float16


def test_A9_the_number_of_classes_of_latents_is_explained(tmp_path: Path) -> None:
    latents(tmp_path, labels=np.arange(30) % 3)
    shape = {"channels": 4, "image_size": 4, "patch": 2, "num_classes": 3}
    config = override(
        small("dit-moe"),
        {
            "data": {"kind": "latents", "path": str(tmp_path)},
            **{f"model.backbone.{name}": value for name, value in shape.items()},
        },
    )
    said = (
        r"^model\.backbone\.num_classes: 3 is not allowed; allowed: 1000; "
        r"data\.num_classes is 1000, its default; the labels are 0\.\.2: --data\.num_classes=3 "
    )
    with pytest.raises(ConfigError, match=said):
        run_source(config)
    assert run_source(override(config, {"data.num_classes": 3})).num_classes == 3
