"""Point clouds: solids whose surfaces are known, a folder of one's own, and their frame."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.data import build_source
from coterie.data.points.clouds import MadeClouds, to_unit_ball
from coterie.data.worlds.solids import SOLIDS, Part, sample_union, turn

COUNT = 20_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_cloud_is_brought_into_the_unit_ball():
    points = np.array([[4.0, 0, 0], [8, 0, 0], [6, 1, 0]])
    unit = to_unit_ball(points, "x")
    assert unit.dtype == np.float32
    assert np.allclose(
        unit, np.array([[-2, -0.5, 0], [2, -0.5, 0], [0, 0.5, 0]]) / math.hypot(2, 0.5)
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((0, 3)), r"x: shape of the cloud: \(0, 3\)"),
        (np.zeros((4, 2)), r"x: shape of the cloud: \(4, 2\)"),
        (np.ones((4, 3)), "x: all points are in one place"),
        (np.array([[0, 0, math.nan], [1, 1, 1]]), "x: holds NaN"),
    ],
)
def test_a_cloud_without_extent_is_refused(points, message):
    with pytest.raises(DataError, match=message):
        to_unit_ball(points, "x")


def test_made_clouds_are_made_once():
    calls = []

    def make(row):
        calls.append(row)
        return np.full((2, 3), row, np.float32)

    clouds = MadeClouds(5, make, 2)
    assert len(clouds) == 5 and clouds[np.array([3, 1, 3])][:, 0, 0].tolist() == [3, 1, 3]
    assert calls == [3, 1] and clouds[np.zeros(0, np.int64)].shape == (0, 2, 3)


# Primitives: the share of points in a region is the region's share of the area.


def test_points_of_a_box_go_by_face_area():
    part = Part("box", (1, 2, 3), (1, 2, 3))
    local = np.abs(part.surface(COUNT, rng()) - (1, 2, 3)) / (1, 2, 3)
    on_face = np.isclose(local, 1)
    assert on_face.any(axis=1).all() and local.max() < 1 + 1e-9
    shares = on_face.mean(axis=0)
    assert np.allclose(shares, np.array([6, 3, 2]) / 11, atol=0.015)
    assert part.area == pytest.approx(88)


def test_points_of_a_cylinder_go_by_area():
    part = Part("cylinder", (0, 0, 0), (2, 3, 2))
    points = part.surface(COUNT, rng())
    on_cap = np.isclose(np.abs(points[:, 1]), 3)
    radius = np.hypot(points[:, 0], points[:, 2])
    assert np.isclose(radius[~on_cap], 2).all() and radius.max() < 2 + 1e-9
    assert part.area == pytest.approx(2 * math.pi * 2 * (6 + 2))
    assert on_cap.mean() == pytest.approx(2 / 8, abs=0.015)
    assert (radius[on_cap] < math.sqrt(2)).mean() == pytest.approx(0.5, abs=0.02)


def test_points_of_an_ellipsoid_go_by_area():
    """A spheroid (a, a, c): the zone |z| < h has a closed form."""
    a, c = 1.0, 2.0
    part = Part("ellipsoid", (0, 0, 0), (a, a, c))
    points = part.surface(COUNT, rng())
    assert np.allclose(np.square(points / (a, a, c)).sum(axis=1), 1)

    def zone(h):
        k = math.sqrt(c * c - a * a) / (c * c)
        u = k * h
        return 2 * math.pi * a / k * (u * math.sqrt(1 - u * u) + math.asin(u))

    assert part.area == pytest.approx(zone(c), rel=0.011)
    assert (np.abs(points[:, 2]) < 1).mean() == pytest.approx(zone(1) / zone(c), abs=0.015)


def test_a_turned_part_keeps_its_points_on_its_surface():
    part = Part("box", (1, 0, 0), (0.2, 0.5, 0.1), turn("z", 30) @ turn("x", 20))
    points = part.surface(500, rng())
    assert not part.inside(points).any()
    assert part.inside(points * 0.99 + 0.01 * np.array([1, 0, 0])).all()
    assert np.allclose(turn("y", 90) @ (0, 0, 1), (1, 0, 0))


@pytest.mark.parametrize("name", SOLIDS)
def test_solids_show_the_outer_surface_of_their_parts(name):
    parts = SOLIDS[name](rng(3))
    points = sample_union(parts, 700, rng(4))
    assert points.shape == (700, 3)
    assert not any(part.inside(points).any() for part in parts)
    assert [len(sample_union(parts, few, rng(few))) for few in (1, 2, 3, 5)] == [1, 2, 3, 5]


def test_solids_are_new_in_every_row_and_split_and_the_same_when_read_again():
    options = {"kind": "solids", "count": 40, "held_out": 20, "num_points": 64}
    train, held_out = (build_source(options, split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (40, 20) and train.shape == (64, 3)
    rows = {row.tobytes() for part in (train, held_out) for row in part.get(range(20)).x.numpy()}
    assert len(rows) == 40
    again = build_source(options).get([7, 3]).x
    assert again.equal(train.get([7, 3]).x)
    other = build_source({**options, "seed": 1}).get([7]).x
    assert not other.equal(train.get([7]).x)


def test_solids_take_their_classes_in_turn():
    source = build_source({"kind": "solids", "classes": ["plane", "chair"], "num_points": 32})
    assert source.class_names == ("plane", "chair")
    assert source.get(range(4)).cond.label.tolist() == [0, 1, 0, 1]
    planes = source.get([0, 2, 4]).x
    assert (planes[:, :, 1].abs().amax(1) < planes[:, :, 2].abs().amax(1)).all()  # long, not tall


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["chair", "tabel"]}, "classes: 'tabel' .*lamp"),
        ({"classes": ["chair", "chair"]}, "classes: .*different"),
        ({"classes": []}, "classes"),
        ({"num_points": 1}, "num_points"),
    ],
)
def test_solids_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build_source({"kind": "solids", **options})


# A folder of one's own


@pytest.fixture
def folder(tmp_path):
    for index in range(12):
        path = tmp_path / ("disc" if index % 2 else "ball") / "train" / f"{index}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng(index).standard_normal((100, 3)))
    return tmp_path


def test_a_folder_of_clouds(folder):
    options = {"kind": "cloud-folder", "path": str(folder), "num_points": 50, "held_out_one_in": 3}
    train, held_out = (build_source(options, split) for split in ("train", "held_out"))
    assert train.class_names == ("ball", "disc") and len(train) + len(held_out) == 12
    batch = train.get(range(len(train)))
    assert batch.x.shape == (len(train), 50, 3) and batch.x.norm(dim=2).amax() <= 1 + 1e-6
    assert batch.x.equal(build_source(options).get(range(len(train))).x)


def test_clouds_of_a_folder_that_cannot_be_read(folder):
    options = {"kind": "cloud-folder", "path": str(folder), "held_out_one_in": 1000}
    with pytest.raises(DataError, match=r"cloud-folder: .*npy: \(100, 3\) .*n >= 512"):
        build_source(options).get([0])
    (folder / "ball" / "train" / "0.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match=r"cloud-folder: .*0\.npy: not a plain array"):
        build_source({**options, "num_points": 8}).get([0])
    for wrong, message in (
        (np.zeros((0, 3)), r"0\.npy: \(0, 3\) .*n >= 8"),
        (np.full((9, 3), "a"), r"0\.npy: '<U1 of shape \(9, 3\)' .*numbers"),
        (np.full((9, 3), 1j), r"0\.npy: 'complex128 of shape \(9, 3\)' .*numbers"),
        (np.full((9, 3), np.nan), r"0\.npy: holds NaN"),
        (np.array([[0, 1, None]] * 9, dtype=object), r"0\.npy: not a plain array"),
    ):
        np.save(folder / "ball" / "train" / "0.npy", wrong)
        with pytest.raises(DataError, match=message):
            build_source({**options, "num_points": 8}).get([0])
    with pytest.raises(DataError, match=r"cloud-folder: path: .*class folders"):
        build_source({**options, "path": str(folder / "ball" / "train")})
