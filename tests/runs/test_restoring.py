"""Restoring folders: squares that leave no seam, the command, and everything that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.cli.main import run as run_line
from coterie.core import outputs
from coterie.core.config import override
from coterie.core.folder import write_bytes
from coterie.core.prediction import Condition
from coterie.data.images import photos
from coterie.data.images.photos import CROP, PhotosConfig
from coterie.data.source import ArraySource
from coterie.denoiser import DenoiserConfig
from coterie.runs.config import RunConfig
from coterie.runs.sample.restoration import corners, ramp, restore_tiled
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from coterie.train.config import TrainConfig
from coterie.train.objectives import RestorationConfig
from coterie.train.objectives.restoration import restore
from small_models import SMALL_RESTORER

Line = Callable[..., tuple[int, str, str]]


def grey_photos(self: PhotosConfig, split: str = "train") -> ArraySource:
    data = np.full((3, 3, CROP, CROP), 120, np.uint8)
    return ArraySource(
        "photos", "image", data, shape=(3, CROP, CROP), licence="", transform=self.transform
    )


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.PhotosConfig, "build", grey_photos)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a network for squares of 16 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos.PhotosConfig, "build", grey_photos)
        config = RunConfig(
            data={"kind": "weather", "size": 16, "count": 8},
            model=DenoiserConfig.from_dict({"backbone": SMALL_RESTORER, "view": "x0"}),
            objective=RestorationConfig(),
            train=TrainConfig(steps=2, batch=4, threads=1),
        )
        return start(config, tmp_path_factory.mktemp("restoring") / "run", progress=False)


@pytest.fixture
def coterie(capsys: pytest.CaptureFixture[str]) -> Line:
    def line(*words: Any) -> tuple[int, str, str]:
        code = run_line([str(word) for word in words])
        return code, *capsys.readouterr()

    return line


def save(folder: Path, name: str, width: int, height: int, seed: int = 0) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return pixels


@pytest.mark.parametrize(("length", "overlap"), [(16, 4), (17, 4), (28, 4), (100, 8), (33, 0)])
def test_squares_cover_an_edge_and_overlap_enough(length: int, overlap: int) -> None:
    found = corners(length, 16, overlap)
    assert found[0] == 0 and found[-1] == length - 16
    steps = np.diff(found)
    assert (steps > 0).all() and (steps <= 16 - overlap).all()
    assert len(found) == 1 or (len(found) - 1) * (16 - overlap) + overlap < length


def test_no_weight_is_zero_and_the_middle_counts_fully() -> None:
    assert ramp(8, 3).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert ramp(4, 0).tolist() == [1.0] * 4


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (31, 53)])
def test_a_network_that_changes_nothing_gives_the_picture_back(shape: tuple[int, int]) -> None:
    picture = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = restore_tiled(picture, lambda squares: squares, 16, 5)
    torch.testing.assert_close(same, picture)


def test_squares_that_disagree_fade_into_each_other() -> None:
    """Each answers with its own number: between two of them it moves evenly, without a jump."""
    numbers = iter(range(100))

    def network(squares: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full_like(square, next(numbers)) for square in squares])

    line = restore_tiled(torch.zeros(1, 16, 26), network, 16, 6)[0, 8]
    assert line[:10].tolist() == [0.0] * 10 and line[16:].tolist() == [1.0] * 10
    torch.testing.assert_close(line[10:16], torch.arange(1, 7) / 7)


def test_a_picture_of_one_square_is_the_networks_own_answer(
    trained: Path, tmp_path: Path, coterie: Line
) -> None:
    pixels = save(tmp_path / "in", "one.jpg.png", 16, 16)
    code, out, _ = coterie("restore", trained, tmp_path / "in", "--out", tmp_path / "out", "-q")
    assert code == 0 and "1 pictures" in out
    given = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()[None] / 127.5 - 1
    with torch.no_grad():
        answer = restore(load_run(trained).model, Condition(channels=given)).value[0]
    want = ((answer.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "out" / "one.jpg.png"))
    assert np.abs(found.astype(int) - want).max() <= 1


def test_a_folder_is_restored_and_the_same_command_goes_on(
    trained: Path, tmp_path: Path, coterie: Line
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder, "wide.png", 41, 20)
    save(folder, "tall.bmp", 16, 33, seed=1)
    (folder / "notes.txt").write_text("no picture")
    line = ("restore", trained, folder, "--out", out, "-q", "--json")
    planned = json.loads(coterie(*line, "--dry-run")[1])
    assert planned == {"pictures": 2, "squares": 4 * 2 + 3, "side": 16, "overlap": 4}
    assert not out.exists()
    told = json.loads(coterie(*line)[1])
    sizes = {Path(file).name: Image.open(file).size for file in told["files"]}
    assert sizes == {"tall.png": (16, 33), "wide.png": (41, 20)}
    before = (out / "wide.png").read_bytes()
    (out / "wide.png").unlink()
    (out / "tall.png").write_bytes(b"kept")
    assert coterie(*line)[0] == 0
    assert (out / "wide.png").read_bytes() == before
    assert (out / "tall.png").read_bytes() == b"kept"
    code, _, err = coterie(*line, "--weights", "model")
    assert code == 2 and "the work of the same run" in err


def test_what_cannot_be_restored_is_named_before_any_work(
    trained: Path, tmp_path: Path, coterie: Line
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"

    def refused(*words: Any) -> str:
        code, _, err = coterie("restore", trained, *words, "-q")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert not out.exists() or list(out.iterdir()) == [out / "other.txt"]
        return err

    assert "folder: " in refused(folder, "--out", out)
    folder.mkdir()
    assert "pictures (.bmp" in refused(folder, "--out", out)
    save(folder, "good.png", 20, 20)
    assert "overlap: 9" in refused(folder, "--out", out, "--overlap", 9)
    assert "overlap: -1" in refused(folder, "--out", out, "--overlap=-1")
    assert "another folder" in refused(folder, "--out", folder)
    save(folder, "small.png", 40, 12)
    assert "small.png: size: '40x12' is not allowed" in refused(folder, "--out", out)
    (folder / "small.png").write_bytes(b"no picture at all")
    assert "small.png: cannot be decoded" in refused(folder, "--out", out)
    whole = (folder / "good.png").read_bytes()
    (folder / "small.png").write_bytes(whole[: len(whole) // 2])
    assert "small.png: cannot be decoded" in refused(folder, "--out", out)
    (folder / "small.png").unlink()
    save(folder, "good.bmp", 20, 20)
    assert "both would be restored as good.png" in refused(folder, "--out", out)
    (folder / "good.bmp").unlink()
    out.mkdir()
    (out / "other.txt").write_text("mine")
    assert "a new or empty folder" in refused(folder, "--out", out)


def test_a_run_that_restores_nothing_is_refused(tmp_path: Path, coterie: Line) -> None:
    config = override(
        RunConfig(),
        {
            "model.backbone": {
                **{"kind": "dit", "image_size": 8, "channels": 1, "patch": 4},
                "trunk": {"depth": 1},
            },
            "train.steps": 1,
            "train.batch": 2,
        },
    )
    path = start(config, tmp_path / "run", progress=False)
    save(tmp_path / "in", "a.png", 20, 20)
    code, _, err = coterie("restore", path, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 2 and "run: objective: 'denoising'" in err


def restored(trained: Path, tmp_path: Path, coterie: Line, *words: Any) -> tuple[int, str]:
    line = ("restore", trained, tmp_path / "in", "--out", tmp_path / "out", "-q", *words)
    code, _, err = coterie(*line)
    return code, err


def test_F1_restoring_replaces_and_removes_nothing_of_others(
    trained: Path, tmp_path: Path, coterie: Line
) -> None:
    out = tmp_path / "out"
    save(tmp_path / "in", "a.png", 16, 16)
    assert restored(trained, tmp_path, coterie)[0] == 0
    assert {path.name for path in out.iterdir()} == {"a.png", "restored.json"}
    (out / "b.part").write_text("mine")
    (out / "b.png").write_text("mine")
    save(tmp_path / "in", "b.bmp", 16, 16)
    code, err = restored(trained, tmp_path, coterie)
    assert code == 2 and "a folder without b.png" in err
    assert (out / "b.png").read_text() == (out / "b.part").read_text() == "mine"
    (out / "b.png").unlink()
    (out / "b.png").symlink_to(tmp_path / "elsewhere.png")
    code, err = restored(trained, tmp_path, coterie)
    assert code == 2 and "nothing is written through links" in err
    assert not (tmp_path / "elsewhere.png").exists()
    (out / "b.png").unlink()
    (out / "b.part").unlink()
    (out / "b.part").symlink_to(tmp_path / "elsewhere.png")
    (out / ".tmp-b.png-99").write_text("{")  # what a killed one left
    assert restored(trained, tmp_path, coterie)[0] == 0
    assert not (tmp_path / "elsewhere.png").exists() and (out / "b.part").is_symlink()
    assert not (out / ".tmp-b.png-99").exists()


def test_F1_a_picture_or_overlap_that_changed_is_not_taken_for_the_old_one(
    trained: Path, tmp_path: Path, coterie: Line
) -> None:
    out = tmp_path / "out"
    for name in ("a.png", "b.png"):
        save(tmp_path / "in", name, 30, 16)
    assert restored(trained, tmp_path, coterie)[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    save(tmp_path / "in", "a.png", 30, 16, seed=1)
    assert restored(trained, tmp_path, coterie)[0] == 0
    assert (out / "a.png").read_bytes() != before["a.png"]
    assert (out / "b.png").read_bytes() == before["b.png"]
    code, err = restored(trained, tmp_path, coterie, "--overlap", "2")
    assert code == 2 and "the work of the same run" in err


def test_F1_a_disk_that_fails_midway_leaves_what_was_done(
    trained: Path, tmp_path: Path, coterie: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name in ("a.png", "b.png"):
        save(tmp_path / "in", name, 16, 16)

    def full(path: Path, data: bytes) -> None:
        if path.name == "b.png":
            raise OSError(28, "No space left on device")
        write_bytes(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "write_bytes", full)
        code, err = restored(trained, tmp_path, coterie)
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {"a.png", "restored.json"}
    assert restored(trained, tmp_path, coterie)[0] == 0
    assert (out / "b.png").is_file()
