"""Invariants of every source that needs no network beyond pip, and the checks at the door."""

import numpy as np
import pytest
import torch

from coterie.core.batch import Source
from coterie.core.errors import ConfigError, DataError
from coterie.core.registry import Part
from coterie.data import SOURCES, ArraySource, Subset, build_source, describe_source, status
from coterie.data.source import is_held_out, split_rows

TOYS = ["gaussian", "gaussian-mixture", "two-moons", "checkerboard", "swiss-roll"]
IMAGES = ["digits", "mnist-5k"]
CLOUDS = ["solids"]
TEXTS = ["stdlib", "pydoc-topics", "arithmetic", "mixed-difficulty"]


@pytest.mark.parametrize("kind", TOYS + IMAGES + TEXTS + CLOUDS)
def test_contract(kind):
    train, held_out = build_source(kind), build_source(kind, "held_out")
    assert isinstance(train, Source) and train.name == kind and train.licence
    assert 0 < len(held_out) < len(train)
    batch = train.get(np.array([5, 0, 5]))
    assert batch.x.shape == (3, *train.shape)
    assert batch.ids.tolist() == [5, 0, 5]
    assert torch.equal(batch.x[0], batch.x[2])
    assert torch.equal(batch.x[1], train.get([0]).x[0])  # no dependence on batch mates
    assert not torch.equal(held_out.get([0]).x, train.get([0]).x)
    if train.modality == "text":
        assert batch.x.dtype == torch.int64 and batch.x.min() >= 0 and batch.x.max() < 260
    else:
        assert batch.x.dtype == torch.float32 and batch.x.abs().max() <= 2
    if train.num_classes == 0:
        assert batch.cond.label is None
    else:
        assert train.num_classes == len(train.class_names)
        assert batch.cond.label.dtype == torch.int64
        assert batch.cond.label.min() >= 0 and batch.cond.label.max() < train.num_classes


@pytest.mark.parametrize("kind", sorted(SOURCES.kinds()))
def test_every_kind_is_catalogued_and_survives_json(kind):
    required = {"path": "somewhere"} if "path" in SOURCES.get(kind).model_fields else {}
    config = SOURCES.parse({"kind": kind, **required})
    assert isinstance(config, Part)
    assert type(config).from_json(config.to_json()) == config
    row = next(row for row in status() if row.kind == kind)
    assert row.summary and row.modality and row.shape and row.count and row.licence
    assert row.licence in describe_source(kind)


@pytest.mark.parametrize("kind", IMAGES)
def test_images_span_the_range_and_have_all_classes(kind):
    source = build_source(kind)
    batch = source.get(np.arange(len(source)))
    assert batch.x.min() == -1 and batch.x.max() == 1
    assert np.bincount(batch.cond.label.numpy()).min() > 100


def test_splits_share_no_picture():
    parts = [build_source("mnist-5k", split) for split in ("train", "held_out")]
    train, held_out = (
        {row.tobytes() for row in part.get(np.arange(len(part))).x.numpy()} for part in parts
    )
    assert len(train) == 4000 and len(held_out) == 1000 and not train & held_out


def test_split_depends_on_name_and_size_alone():
    train, held_out = split_rows("a", 100, "train"), split_rows("a", 100, "held_out")
    assert sorted([*train, *held_out]) == list(range(100)) and len(held_out) == 20
    assert not np.array_equal(held_out, split_rows("b", 100, "held_out"))
    assert split_rows("a", 10, "held_out").tolist() == [1, 5]  # frozen: splits never move
    assert split_rows("a", 1, "train").tolist() == [0]


def test_hashed_split_holds_out_the_stated_share():
    share = np.mean([is_held_out(f"document {i}") for i in range(5000)])
    assert abs(share - 0.1) < 0.02


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({}, 28),
        ({"pad": 2}, 32),
        ({"crop": 2}, 24),
        ({"size": 16}, 16),
        ({"size": 8, "pad": 1}, 10),
    ],
)
def test_resize_crop_pad(options, side):
    source = build_source({"kind": "mnist-5k", **options})
    x = source.get(np.arange(8)).x
    assert source.shape == (1, side, side) and x.shape[1:] == source.shape
    assert x.min() >= -1 and x.max() <= 1
    if options.get("pad"):
        assert (x[:, :, 0] == -1).all()  # the background
    plain = build_source("mnist-5k").get(np.arange(8)).x
    if options == {"pad": 2}:
        assert torch.equal(x[:, :, 2:-2, 2:-2], plain)
    if options == {"size": 16}:
        assert torch.allclose(x.mean((1, 2, 3)), plain.mean((1, 2, 3)), atol=0.02)


def test_crop_must_leave_something():
    with pytest.raises(ConfigError, match=r"crop: 4 is not allowed; allowed: 0\.\.3"):
        SOURCES.parse({"kind": "digits", "crop": 4})


@pytest.mark.parametrize("indices", [[-1], [1438], [[0]], [0.5], ["a"], [True]])
def test_bad_indices_are_refused(indices):
    with pytest.raises(DataError, match=r"digits\.get\(indices\)"):
        build_source("digits").get(indices)


def test_empty_selection_gives_an_empty_batch():
    assert build_source("digits").get(np.zeros(0, dtype=int)).x.shape == (0, 1, 8, 8)


def test_unknown_kind_and_split_list_what_is_allowed():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        build_source("digit")
    with pytest.raises(ConfigError, match="train or held_out"):
        build_source("digits", "test")


def _array_source(**changes):
    given = {"data": np.zeros((4, 2), np.float32), "shape": (2,), "licence": "-"} | changes
    return ArraySource("mine", "vector", given.pop("data"), **given)


def test_not_finite_data_names_source_and_sample():
    data = np.zeros((4, 2), np.float32)
    data[2, 1], data[3, 0] = np.nan, np.inf
    source = _array_source(data=data)
    assert source.get([0, 1]).x.shape == (2, 2)
    with pytest.raises(DataError, match="mine: sample 3 holds NaN"):
        source.get([0, 3, 2])


@pytest.mark.parametrize(("labels", "wrong"), [([0, 1, 2, 0], 2), ([0, -1, 0, 0], -1)])
def test_class_id_out_of_range_names_the_range(labels, wrong):
    with pytest.raises(DataError, match=rf"class id of sample \d: {wrong} .* allowed: 0\.\.1"):
        _array_source(labels=np.array(labels), class_names=("a", "b"))


def test_lengths_and_types_of_labels_are_checked():
    with pytest.raises(DataError, match="labels: 3 is not allowed; allowed: 4 entries"):
        _array_source(labels=np.zeros(3, int), class_names=("a",))
    with pytest.raises(DataError, match="a 1-D integer array"):
        _array_source(labels=np.zeros(4), class_names=("a",))
    with pytest.raises(DataError, match="captions: 1 is not allowed"):
        _array_source(captions=["one"])


def test_subset_keeps_the_ids_of_the_whole():
    whole = build_source("digits")
    part = Subset(whole, [7, 3, 11])
    assert isinstance(part, Source) and len(part) == 3
    batch = part.get([2, 0])
    assert batch.ids.tolist() == [11, 7]
    assert torch.equal(batch.x, whole.get([11, 7]).x)
    with pytest.raises(DataError):
        part.get([3])
