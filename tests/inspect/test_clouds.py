"""Pictures of point clouds and of experts over a volume, and their place on the page."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_routings import routing

from coterie.core.errors import DataError
from coterie.inspect import ReportData, Trace, analyse_amounts, write_report
from coterie.inspect.plots import clouds as pictures
from coterie.inspect.plots.clouds import plot_clouds, project
from coterie.inspect.plots.experts_per_row import plot_amounts_by_position
from coterie.inspect.plots.positions import face, plot_positions
from coterie.inspect.plots.style import render


def clouds(count: int = 5, points: int = 30) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, points, 3)).astype(np.float32)


def test_the_camera_keeps_lengths_and_looks_from_above_the_floor() -> None:
    x = clouds().astype(np.float64)
    at, near = project(x)
    seen = np.concatenate([at, near[..., None]], axis=-1)
    assert np.allclose(np.linalg.norm(seen, axis=-1), np.linalg.norm(x, axis=-1))
    (place,), (depth,) = project(np.array([[[0, 1, 0], [0, 0, 1], [1, 0, 0.0]]]))
    assert place[0, 0] == pytest.approx(0) and place[0, 1] > 0.9  # up stays up
    assert depth[0] > 0 and depth[1] > 0 > depth[2]
    assert place[2, 0] == pytest.approx(math.cos(pictures.TURN))


def test_clouds_are_drawn_far_to_near_each_in_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_CLOUDS", 3)
    monkeypatch.setattr(pictures, "MAX_POINTS", 20)
    x = clouds()
    x[0, 0] = 1000.0  # a stray point
    plot = plot_clouds(x, [0, 1, -1, 0, 0], ("chair", "table"))
    assert "first 3 of 5" in plot.caption and "3 generated clouds of 30 points" in plot.alt
    (axes,) = plot.draw().axes
    (dots,) = axes.collections
    assert len(dots.get_offsets()) == 60
    assert np.all(np.diff(dots.get_array()) >= 0)
    assert sorted(text.get_text() for text in axes.texts) == ["chair", "none", "table"]
    columns = np.asarray(dots.get_offsets())[:, 0]
    assert columns.min() >= 0 and columns.max() <= 3


def test_the_picture_has_two_themes() -> None:
    picture = render(plot_clouds(clouds(), None, ()))
    assert picture.light[:4] == picture.dark[:4] == b"\x89PNG" and picture.light != picture.dark


def test_clouds_stand_on_the_page(tmp_path: Path) -> None:
    page = write_report(tmp_path, ReportData(title="x", samples=clouds(), labels=[0] * 5))
    assert (tmp_path / "samples.png").is_file()
    assert "Point clouds drawn from the model" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", [(4, 5, 2), (4, 0, 3), (4, 2, 3, 5, 6)])
def test_samples_of_another_form_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"samples: .*\[n, P, 3\]"):
        write_report(tmp_path, ReportData(title="x", samples=np.zeros(shape, np.float32)))


def test_a_volume_is_seen_from_the_front() -> None:
    """Tokens are ordered x, y, z with y upwards; one expert holds each corner of the front."""
    values = np.full((2, 3, 4), np.nan)
    values[0, 2] = 1.0  # left, top
    values[1, 0, :2] = 2.0  # right, bottom, half of it unseen
    seen = face(values.reshape(-1), (2, 3, 4))
    assert seen.shape == (3, 2) and seen[0, 0] == 1.0 and seen[2, 1] == 2.0
    assert np.isnan(seen).sum() == 4
    flat = np.arange(6.0)
    assert np.array_equal(face(flat, (2, 3)), flat.reshape(2, 3))


def test_maps_of_a_volume_put_each_expert_where_its_tokens_are() -> None:
    out = Trace(grid=(2, 2, 3))
    column = torch.arange(12) // 3  # which (x, y) a token is in
    out.add([routing(column.repeat(30), 4, (30, 12))])
    plot = plot_positions(out.routers, ["0"], out.grid)
    assert plot is not None and plot.title == "Experts over the volume"
    assert "from the front" in plot.caption and "2 by 2 tokens" in plot.alt
    image = next(ax.images[0] for ax in plot.draw().axes if ax.images)
    canvas = np.ma.filled(image.get_array(), np.nan)
    for expert, (row, tile_column) in enumerate(((1, 0), (0, 0), (1, 1), (0, 1))):
        tile = canvas[:, 10 * expert : 10 * expert + 8][::4, ::4]
        expected = np.zeros((2, 2))
        expected[row, tile_column] = 1
        assert (tile == expected).all()


def test_experts_per_row_of_a_volume_are_named_so() -> None:
    out = Trace(grid=(2, 2, 2))
    ids = torch.tensor([[0, 1], [0, 2]] * 40)  # 2 = nobody
    out.add([routing(ids, 2, (10, 8))])
    plot = plot_amounts_by_position(analyse_amounts(out), out.grid)
    assert plot is not None and "the volume (seen from the front" in plot.caption
    assert plot.draw().axes
