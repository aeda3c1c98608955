"""Meshes, and the library of furniture: its catalogue, its classes, models that cannot be read."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.data import build_source
from coterie.data.download.cache import open_array
from coterie.data.points import furniture
from coterie.data.points.meshes import read_obj, sample_surface

CUBE = b"""
# a cube of side 2, two of its faces cut, one counted from the end
v -1 -1 -1
v 1 -1 -1
v 1 1 -1
v -1 1 -1
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
vn 0 0 1
f 1//1 2//1 3//1 4//1
f -4/1/1 -3/1/1 -2/1/1 -1/1/1
f 1 2 6 \\
5
f 4 3 7 8
f 1 4 8
f 1 8 5
f 2 3 7
f 2 7 6
"""


def test_obj_faces_become_triangles():
    triangles = read_obj(CUBE, "cube")
    assert triangles.shape == (12, 3, 3)
    edges = triangles[:, 1:] - triangles[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    assert np.allclose(areas, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"v 0 0 0\n", "m: holds no face"),
        (b"v 0 0\nf 1 1 1", "m: line 1"),
        (b"v 0 0 0\nf 1 1 2", "m: line 2: vertex 2 of 1"),
        (b"v 0 0 0\nf 1 1 0", "m: line 2: vertex 0"),
        (b"v 0 0 0\n\nf a b c", "m: line 3"),
        (b"v 0 0 nan\nf 1 1 1", "m: a vertex is not finite"),
    ],
)
def test_meshes_that_cannot_be_read_are_named(content, message):
    with pytest.raises(DataError, match=message):
        read_obj(content, "m")


def test_points_go_by_area_and_lie_on_the_surface():
    large = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0.0]])
    small = np.array([[0, 0, 5], [1, 0, 5], [0, 2, 5.0]])
    points = sample_surface(np.stack([large, small]), 20_000, np.random.default_rng(0))
    up = points[:, 2] == 5
    assert up.mean() == pytest.approx(0.25, abs=0.015)
    x, y = points[~up, 0] / 3, points[~up, 1] / 2
    assert x.min() >= 0 and y.min() >= 0 and (x + y).max() <= 1 + 1e-9
    assert x.mean() == pytest.approx(1 / 3, abs=0.01)
    with pytest.raises(DataError, match="no area"):
        sample_surface(np.zeros((2, 3, 3)), 5, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "category", "label"),
    [
        ("Desk lamp", "Lights", "lamp"),
        ("Glass door cabinet", "Kitchen", "cabinet"),
        ("Winchester armchair", "Living room", "chair"),
        ("Wooden desk", "Office", "table"),
        ("Table fan", "Miscellaneous", ""),
        ("Bulldog", "Characters", ""),
        ("Sitting female", "Characters", "person"),
        ("Mannequin male", "Miscellaneous", ""),
        ("City bus", "Vehicles", "vehicle"),
        ("Bedside clock", "Bedroom", ""),
    ],
)
def test_classes_come_from_names_and_categories(name, category, label):
    assert furniture.class_of(name, category) == label
    assert label in (*furniture.CLASSES, "")


def library(models):
    """A catalogue file of (name, category, obj or None, extra lines)."""
    lines, buffer = ["id=Test", "name=Test"], io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for number, (name, category, content, *extra) in enumerate(models, start=1):
            lines += [f"name#{number}={name}", f"category#{number}={category}"]
            lines += [f"model#{number}=/m/{number}.obj", f"creator#{number}=Someone"]
            lines += [f"{line.replace('#', f'#{number}')}" for line in extra]
            if content is not None:
                bundle.writestr(f"m/{number}.obj", content)
        bundle.writestr(furniture.CATALOGUE, "\n".join(lines).encode("latin-1"))
    return buffer.getvalue()


def shaped(index):
    return CUBE.replace(b"v 1 1 1", b"v 1 1 %d" % (index + 2))


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """The source over twelve chairs and twelve tables, two of them broken."""
    good = [("Chair" if i % 2 else "Table", "Living room", shaped(i)) for i in range(24)]
    broken = [("Sofa", "Living room", b"v 0 0 0"), ("Bed", "Bedroom", None), ("Cup", "", None)]
    wide = [("Bunk bed", "Bedroom", CUBE, "width#=300", "height#=100", "depth#=100")]
    content = library(good + broken + wide)
    monkeypatch.setattr(furniture, "STORED", 256)
    furniture._convert([{"a/Test.sh3f": content}], tmp_path)
    names = ("clouds", "labels", "held_out")
    monkeypatch.setattr(
        furniture, "load", lambda kind, *_: [open_array(tmp_path, n) for n in names]
    )
    return tmp_path


def test_conversion_counts_what_it_leaves_out(converted):
    found = json.loads((converted / "models.json").read_text())
    assert len(found["models"]) == 25 and found["models"][0]["library"] == "Test"
    assert sorted(found["left_out"]) == ["m/25.obj", "m/26.obj"]
    assert "holds no face" in found["left_out"]["m/25.obj"]
    assert found["models"][0]["creator"] == "Someone"
    bed = open_array(converted, "clouds")[-1].astype(np.float64)
    x, y, z = np.ptp(bed, axis=0)
    assert x == pytest.approx(3 * y, rel=0.05) and y == pytest.approx(z, rel=0.05)


def test_equal_geometry_shares_a_key_whatever_its_place():
    moved = CUBE.replace(b"v -1", b"v -1.0")
    entries = [furniture.Entry("a", "", "a", "", (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))] * 2
    keys = [furniture.cloud_of(c, e)[1] for c, e in zip((CUBE, moved), entries, strict=True)]
    assert keys[0] == keys[1] != furniture.cloud_of(shaped(3), entries[0])[1]


def test_models_are_never_in_both_splits_and_copies_differ(converted):
    options = {"kind": "furniture3d", "num_points": 64, "copies": 3}
    train, held_out = (build_source(options, split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 3 * 25 and len(held_out) > 0
    models = len(train) // 3
    batch = train.get([0, models, 2 * models])
    assert len({row.tobytes() for row in batch.x.numpy()}) == 3
    assert len(set(batch.cond.label.tolist())) == 1
    assert batch.x.equal(train.get([0, models, 2 * models]).x)
    assert batch.x.norm(dim=2).amax() <= 1 + 1e-6


def test_classes_are_chosen_and_their_numbers_follow(converted):
    options = {"kind": "furniture3d", "num_points": 64, "classes": ["table", "chair"]}
    source = build_source(options)
    assert source.class_names == ("table", "chair")
    labels = source.get(range(len(source))).cond.label
    assert sorted(set(labels.tolist())) == [0, 1]
    with pytest.raises(ConfigError, match="classes: 'tabel'"):
        build_source({**options, "classes": ["tabel"]})
    with pytest.raises(ConfigError, match="num_points: 9000"):
        build_source({**options, "num_points": 9000})
