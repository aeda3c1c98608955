"""Pairs of pictures from folders: one square of both, splits by pair, what is wrong by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coterie.core.errors import DataError
from coterie.data import build_source


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve pairs of each of two kinds; the degraded picture is the clean one plus 20."""
    rng = np.random.default_rng(0)
    for kind in ("snow", "rain"):
        for index in range(12):
            clean = rng.integers(0, 200, (20 + index, 30, 3), dtype=np.uint8)
            save(tmp_path / kind / "gt" / f"{index}.png", clean)
            save(tmp_path / kind / "input" / f"{index}.png", clean + 20)
    return tmp_path


def source(root: Path, split: str = "train", **fields: Any) -> Any:
    config = {"kind": "pairs-folder", "path": str(root), "size": 16, "held_out_one_in": 4, **fields}
    return build_source(config, split)  # type: ignore[arg-type]


def test_both_pictures_of_a_pair_show_the_same_square(root: Path) -> None:
    train, again, held_out = source(root), source(root), source(root, "held_out")
    assert len(train) + len(held_out) == 24 * 8 and len(held_out) % 8 == 0 and len(held_out)
    assert train.class_names == ("rain", "snow") and train.shape == (3, 16, 16)
    rows = np.arange(len(train))
    batch = train.get(rows)
    np.testing.assert_allclose((batch.cond.channels - batch.x).numpy(), 20 / 127.5, atol=1e-5)
    assert set(batch.cond.label.tolist()) == {0, 1}
    assert (batch.x == again.get(rows).x).all()
    assert not (batch.x[0] == batch.x[1]).all()
    assert train.get(rows[:0]).x.shape == (0, 3, 16, 16)


def test_folder_names_of_the_published_sets(root: Path, tmp_path: Path) -> None:
    (root / "rain" / "input").rename(root / "rain" / "data")
    found = source(root, degraded="data")
    assert found.class_names == ("rain",)


def test_what_is_wrong_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"pairs-folder: path: .*existing folder"):
        source(root / "nowhere")
    with pytest.raises(DataError, match=r"pairs-folder: path: .*KIND/hazy and KIND/gt"):
        source(root, degraded="hazy")
    with pytest.raises(DataError, match=r"(20|21|22|23), 30\).*24 pixels or more a side"):
        source(root, size=24, crops=1).get(np.arange(8))
    with pytest.raises(DataError, match=r"none of them is in the split 'held_out'"):
        source(root, "held_out", held_out_one_in=10_000)
    save(root / "rain" / "input" / "0.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(DataError, match=r"input/0\.png: shape: \(3, 40, 40\)"):
        every(root)
    (root / "rain" / "input" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"input/0\.png: cannot be decoded"):
        every(root)
    (root / "rain" / "gt" / "0.png").unlink()
    with pytest.raises(DataError, match=r"input/0\.png: no picture of this name in .*gt"):
        source(root)


def every(root: Path) -> None:
    for split in ("train", "held_out"):
        found = source(root, split)
        found.get(np.arange(len(found)))
